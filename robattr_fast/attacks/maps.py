"""The map that is attacked: which attribution of which model, and with which noise at each step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.attacks.geometry import working_dtype
from robattr_fast.attributions import gradient, input_x_gradient, integrated_gradients, magnitude, smoothgrad
from robattr_fast.attributions.smoothed import SEED
from robattr_fast.attributions.smoothgrad import _row_map
from robattr_fast.ops import _check
from robattr_fast.ops.noisy_samples import noisy_samples
from robattr_fast.ops.topk_threshold import topk_threshold
from robattr_fast.reference._select import selected

Attribution: TypeAlias = Callable[..., torch.Tensor]
"""(model, x [B, *S], target [B], create_graph=False) -> maps [B, *M]."""


def smoothgrad_of_own_classes(
    model: nn.Module, x: torch.Tensor, target: torch.Tensor | None = None, create_graph: bool = False, **settings: Any
) -> torch.Tensor:
    """`robattr_fast.attributions.smoothgrad` of the largest logit of each noisy copy, whatever the target."""
    return smoothgrad(model, x, None, create_graph, **settings)


_NOISY = (smoothgrad, smoothgrad_of_own_classes)
_NAMED: dict[str, Attribution] = {
    "gradient": gradient,
    "input_x_gradient": input_x_gradient,
    "ig": integrated_gradients,
    "integrated_gradients": integrated_gradients,
    "smoothgrad": smoothgrad,
    "sparsified": functools.partial(smoothgrad, kind="sparsified"),
}
_SINGLE_PASS = (gradient, input_x_gradient)
_HELD = 64  # samples whose graphs are in memory together
_CHUNK = 16  # rows of a pass on a CPU: more do not stay in its caches
_MEANS = ("plain", "absolute", "squared", "sparsified", "soft_topk")
_DEFAULTS: dict[str, Any] = {"kind": "plain", "tau": 0.1, "gamma": None, "levels": 1, "temperature": None}
_ZERO = torch.zeros(1, dtype=torch.int64)  # one id for all images: a map is a function of its image
_WIDTH = 0.3  # of a soft top-k, in units of the threshold it stands for
_TRIAL = 8  # noisy samples that find that threshold
_TRIAL_SEED = 0x517CC1B727220A95


def resolved(explain: str | Attribution, settings: Mapping[str, Any] | None) -> Attribution:
    """The attribution that a name, or a callable, with these keywords stands for."""
    if isinstance(explain, str):
        if explain not in _NAMED:
            raise ValueError(f"explain: got {explain!r}, expected one of {', '.join(_NAMED)}, or a callable")
        explain = _NAMED[explain]
    elif not callable(explain):
        raise TypeError(f"explain: got {type(explain).__name__}, expected a name or a callable")
    return _merged(explain, dict(settings or {}))


def _merged(explain: Attribution, settings: dict[str, Any]) -> Attribution:
    if isinstance(explain, functools.partial) and not explain.args:
        return _merged(explain.func, {**explain.keywords, **settings})
    return functools.partial(explain, **settings) if settings else explain


def _keywords(explain: Attribution) -> dict[str, Any]:
    return dict(explain.keywords) if isinstance(explain, functools.partial) else {}


def _function(explain: Attribution) -> Attribution:
    return explain.func if isinstance(explain, functools.partial) else explain


class Explained:
    """Maps of points, of one attribution.

    Attributes:
        noisy: the attribution is the mean over noisy samples (`robattr_fast.attributions.smoothgrad`, or its
            `magnitude`). Every step then draws its own noise, one for all images; passes are one image wide, since the
            samples of one image fill them.
        folds: it needs nothing of the model but its gradients, so that layers may be folded.
    """

    def __init__(self, explain: Attribution) -> None:
        self.explain = explain
        self._outer = None
        inner = explain
        if _function(explain) is magnitude:
            inner = _merged(_keywords(explain)["explain"], {})
            self._outer = explain
        self._inner = inner
        self.noisy = _function(inner) in _NOISY
        if self.noisy:
            settings = _keywords(inner)
            missing = [name for name in ("sigma", "samples") if name not in settings]
            if missing:
                raise ValueError(f"explain: got smoothgrad without {' and '.join(missing)}, expected both")
        self.single_pass = inner is explain and explain in _SINGLE_PASS
        self.folds = self.single_pass or self.noisy

    def maps(
        self, model: nn.Module, points: torch.Tensor, target: torch.Tensor, create_graph: bool, draw: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(maps [N, *M], float32 at least; logits [N, classes] where they come with them, else None).

        draw: of the noise; 0 is the attribution's own.
        """
        logits = None
        if self.single_pass:
            found, logits = _model.input_gradient(model, points, target, create_graph=create_graph)
            if self.explain is input_x_gradient:
                found = found * points
        elif draw and self._few:
            found = self._mean(model, points, target, create_graph, draw)
        else:
            settings = {"create_graph": True} if create_graph else {}
            found = self._drawn(draw)(model, points, target, **settings)
        return found.to(torch.promote_types(found.dtype, torch.float32)), logits

    @property
    def _few(self) -> bool:
        """Whether the graphs of all samples of an image may be held: then nothing needs to be computed twice."""
        settings = _keywords(self._inner)
        return self.noisy and settings["samples"] <= _HELD and settings.get("kind", "plain") in _MEANS

    def _mean(
        self, model: nn.Module, points: torch.Tensor, target: torch.Tensor, create_graph: bool, draw: int
    ) -> torch.Tensor:
        """What `_drawn` gives but for rounding, in one pass, from a model that was checked before."""
        settings = _keywords(self._inner)
        names = ("kind", "tau", "gamma", "levels", "temperature")
        kind, tau, gamma, levels, temperature = (settings.get(name, _DEFAULTS[name]) for name in names)
        tau, gamma = _check.fractions(tau, gamma)
        if create_graph:
            levels = None if kind == "sparsified" else levels
        of_row = _row_map(kind, points[0].numel(), tau, gamma, levels, temperature)
        samples, chunk = settings["samples"], _CHUNK if points.device.type == "cpu" else _HELD
        own_classes = _function(self._inner) is smoothgrad_of_own_classes
        first = settings.get("first_sample", 0) + draw * samples
        found = []
        for point, label in zip(points, target, strict=True):
            total = torch.zeros((), dtype=torch.float64, device=point.device)
            for done in range(0, samples, chunk):
                count = min(chunk, samples - done)
                rows = noisy_samples(
                    point[None],
                    settings["sigma"],
                    count,
                    seed=settings.get("seed", SEED),
                    first_sample=first + done,
                    image_ids=_ZERO.to(point.device),
                )[0]
                classes = None if own_classes else label.expand(count)
                gradient, _ = _model.input_gradient(model, rows, classes, create_graph=create_graph)
                with torch.set_grad_enabled(create_graph):
                    total = total + of_row(gradient).sum(dim=0, dtype=torch.float64)
            found.append((total / samples).to(working_dtype(points)))
        maps = torch.stack(found)
        return maps.abs() if self._outer is not None else maps

    def _drawn(self, draw: int) -> Attribution:
        if not self.noisy or not draw:
            return self.explain
        settings = _keywords(self._inner)
        first = settings.get("first_sample", 0) + draw * settings["samples"]
        inner = _merged(self._inner, {"first_sample": first})
        return inner if self._outer is None else _merged(self._outer, {"explain": inner})

    def relaxed(self, model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> list[Explained]:
        """Per image of x [B, *S] the same attribution with a derivative.

        A sparsified map that is rounded, or has but zeros and ones, has none: in its place is the soft top-k of as many
        elements, whose temperature is a share of the threshold of the image's own gradients.
        """
        settings = _keywords(self._inner)
        tau, gamma = settings.get("tau", 0.1), settings.get("gamma")
        if not self.noisy or settings.get("kind") != "sparsified":
            return [self] * len(x)
        if settings.get("levels", 1) is None and gamma is not None and gamma < tau:
            return [self] * len(x)
        size = smoothgrad(
            model, x, target, kind="absolute", sigma=settings["sigma"], samples=_TRIAL, seed=_TRIAL_SEED
        ).flatten(1)
        thresholds = topk_threshold(size, selected(tau, size.shape[1])).double()
        soft = []
        for threshold in thresholds.tolist():
            change = {"kind": "soft_topk", "temperature": _WIDTH * threshold or 1.0, "levels": 1, "gamma": None}
            inner = _merged(self._inner, change)
            soft.append(Explained(inner if self._outer is None else _merged(self._outer, {"explain": inner})))
        return soft
