"""Captum: attribution classes that take noise from (seed, image, sample, element) and keep nothing of size q.

from robattr_fast.integrations.captum import NoiseTunnel, SmoothGrad
SmoothGrad(model).attribute(x, target=3, sigma=0.2, samples=64)
NoiseTunnel(captum.attr.Saliency(model)).attribute(x, nt_samples=64, stdevs=0.2, target=3)
robattr_fast.certify(model, x, explain=functools.partial(attributed, method=captum.attr.Occlusion, ...), sigma=0.2)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from robattr_fast.attributions.resize import check_resize, resized
from robattr_fast.attributions.smoothgrad import smoothgrad
from robattr_fast.ops import _check, noisy_samples
from robattr_fast.sampling.arguments import check_image_ids

try:
    from captum.attr import Attribution, GradientAttribution
except ImportError as error:
    raise ImportError(
        f"the Captum integration needs captum >= 0.9: pip install 'robattr-fast[integrations]' ({error})"
    ) from error

TYPES = ("smoothgrad", "smoothgrad_sq", "vargrad")


class SmoothGrad(GradientAttribution):
    """`robattr_fast.smoothgrad` as a Captum attribution: every kind, deterministic, batch size chosen by trial."""

    def __init__(self, model: nn.Module) -> None:
        """model: eval-mode module that returns logits [B, classes]."""
        super().__init__(model)

    def attribute(
        self,
        inputs: torch.Tensor | tuple[torch.Tensor],
        target: int | Sequence[int] | torch.Tensor | None = None,
        *,
        sigma: float,
        samples: int,
        **settings: Any,
    ) -> torch.Tensor | tuple[torch.Tensor]:
        """A map per image, [B, *S]; in a tuple if the images are, as the metrics of Captum pass them.

        Args:
            inputs: [B, *S] float images.
            target: class or classes [B] to explain; None: the largest logit of each noisy copy.
            sigma, samples, settings: see `robattr_fast.smoothgrad`.
        """
        if not isinstance(inputs, tuple):
            return smoothgrad(self.forward_func, inputs, target=target, sigma=sigma, samples=samples, **settings)
        if len(inputs) != 1:
            raise ValueError(f"inputs: got {len(inputs)} tensors, takes one")
        return (smoothgrad(self.forward_func, inputs[0], target=target, sigma=sigma, samples=samples, **settings),)


def attributed(
    model: nn.Module,
    x: torch.Tensor,
    target: torch.Tensor | Sequence[int] | int | None = None,
    create_graph: bool = False,
    *,
    method: type[Attribution],
    layer: str | None = None,
    size: bool = True,
    resize: str | None = "linear",
    **settings: Any,
) -> torch.Tensor:
    """The map of a Captum method, in the form of `robattr_fast.attributions`: an ``explain=`` of `certify`.

    Certified are fixed functions of each row: methods that draw random numbers (GradientShap, Lime, KernelShap, a
    NoiseTunnel) are refused there, except by chance of two equal draws.

    Args:
        model: eval-mode module that returns logits [B, classes].
        x: [B, *S].
        target: class or classes [B]; None: the largest logit of each image.
        create_graph: must be False: Captum's attributions carry no graph. `robattr_fast.attributions` has some that do.
        method: class of captum.attr, made with the model, and with the layer where there is one.
        layer: name of a submodule, for Captum's layer methods that attribute to one.
        size: take absolute values, as `certify` does of gradients; of a layer's map after the sum over channels.
        resize: of a layer's map, to the size of x: "linear" or "nearest"; None: the layer's own size.
        settings: what ``method.attribute`` takes.

    Returns:
        [B, *S], or of a layer one value per pixel, [B, *S[1:]]: pass channel_sum=True to `certify`.
    """
    if create_graph:
        raise ValueError("create_graph: got True, expected False: Captum's attributions carry no graph")
    check_resize(resize)
    leaf = x.detach().clone()  # Captum makes its input require gradients for a while
    if target is None:
        with torch.no_grad():
            target = model(leaf).argmax(dim=1)
    made = method(model) if layer is None else method(model, model.get_submodule(layer))
    with warnings.catch_warnings():
        # Of hooks and of gradients that are asked for: both end with the call.
        warnings.simplefilter("ignore", UserWarning)
        found = made.attribute(leaf, target=target, **settings)
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"method: {method.__name__} returned {type(found).__name__}, expected one tensor")
    maps = found.detach()
    if maps.shape != x.shape:
        if maps.dim() != x.dim() or len(maps) != len(x):
            raise ValueError(f"method: {method.__name__} returned shape {tuple(maps.shape)} for {tuple(x.shape)}")
        maps = resized(maps.sum(dim=1), x.shape[2:], resize)
    return maps.abs() if size else maps


class NoiseTunnel(Attribution):
    """captum.attr.NoiseTunnel with its arguments, for any attribution method of Captum.

    It differs in this: sample j of an image is the same for every ``nt_samples_batch_size``, every batch that the image
    is in, and every ``nt_samples`` above j; a seed says which it is; and sums are float64, so that the variance of
    vargrad does not cancel and bfloat16 works. ``draw_baseline_from_distrib`` is refused: it draws from torch's
    generator.
    """

    def __init__(
        self,
        attribution_method: Attribution,
        *,
        seed: int = 0,
        image_ids: torch.Tensor | Sequence[int] | None = None,
    ) -> None:
        """seed, image_ids: see `robattr_fast.noisy_samples`; of several inputs the i-th takes seed + i."""
        super().__init__(attribution_method.forward_func)
        self.attribution_method = attribution_method
        self.seed = seed
        self.image_ids = image_ids

    @property
    def multiplies_by_inputs(self) -> bool:
        return self.attribution_method.multiplies_by_inputs

    def has_convergence_delta(self) -> bool:
        return self.attribution_method.has_convergence_delta()

    def attribute(
        self,
        inputs: torch.Tensor | tuple[torch.Tensor, ...],
        nt_type: str = "smoothgrad",
        nt_samples: int = 5,
        nt_samples_batch_size: int | None = None,
        stdevs: float | tuple[float, ...] = 1.0,
        draw_baseline_from_distrib: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Mean ("smoothgrad"), mean square ("smoothgrad_sq") or variance ("vargrad") over noisy copies of the inputs.

        Args:
            inputs: [B, *S], or a tuple of such.
            nt_type: what is computed of the attributions of the copies.
            nt_samples: number of copies per image.
            nt_samples_batch_size: copies per image in one call of the method; None: all at once.
            stdevs: standard deviation of the noise, one or one per input; 0 leaves an input as it is.
            kwargs: what the method's ``attribute`` takes. Tensors and lists with one entry per image are repeated for
                its copies.

        Returns:
            What the method returns, smoothed, in its dtype; with ``return_convergence_delta`` a pair with its deltas,
            one per noisy copy.
        """
        if nt_type not in TYPES:
            raise ValueError(f"nt_type: got {nt_type!r}, takes one of {', '.join(TYPES)}")
        if draw_baseline_from_distrib:
            raise ValueError("draw_baseline_from_distrib: got True, takes False: the samples would not be reproducible")
        nt_samples = _check.integer("nt_samples", nt_samples, 1, 2**32 - 1)
        chunk = nt_samples if nt_samples_batch_size is None else nt_samples_batch_size
        chunk = _check.integer("nt_samples_batch_size", chunk, 1, 2**32 - 1)
        images = inputs if isinstance(inputs, tuple) else (inputs,)
        sigmas = stdevs if isinstance(stdevs, tuple) else (stdevs,) * len(images)
        if len(sigmas) != len(images):
            raise ValueError(f"stdevs: got {len(sigmas)}, takes one number or one for each of the {len(images)} inputs")
        moments: list[_Moments] = []
        deltas = []
        for first in range(0, nt_samples, chunk):
            count = min(chunk, nt_samples - first)
            noisy = tuple(
                self._noisy(x, sigma, count, i, first) for i, (x, sigma) in enumerate(zip(images, sigmas, strict=True))
            )
            found = self.attribution_method.attribute(
                noisy if isinstance(inputs, tuple) else noisy[0], **_repeated(kwargs, len(images[0]), count)
            )
            if kwargs.get("return_convergence_delta"):
                found, delta = found
                deltas.append(delta)
            maps = found if isinstance(found, tuple) else (found,)
            moments = moments or [_Moments() for _ in maps]
            for moment, rows in zip(moments, maps, strict=True):
                moment.add(rows.detach().unflatten(0, (-1, count)))
        smoothed = tuple(moment.result(nt_type, nt_samples) for moment in moments)
        result = smoothed if isinstance(found, tuple) else smoothed[0]
        return (result, torch.cat(deltas)) if deltas else result

    def _noisy(self, x: torch.Tensor, sigma: float, count: int, index: int, first: int) -> torch.Tensor:
        """[B * count, *S]: the copies of one image next to each other."""
        sigma = _check.not_negative("stdevs", sigma)
        if sigma == 0:
            noisy = x.detach().repeat_interleave(count, dim=0)
        else:
            noisy = noisy_samples(
                x.detach(),
                sigma,
                count,
                seed=(self.seed + index) % 2**64,
                first_sample=first,
                image_ids=check_image_ids(self.image_ids, x),
            ).flatten(0, 1)
        return noisy.requires_grad_(isinstance(self.attribution_method, GradientAttribution))


class _Moments:
    """float64 sums of the attributions and of their squares, over samples."""

    def __init__(self) -> None:
        self.first: torch.Tensor | float = 0.0
        self.second: torch.Tensor | float = 0.0

    def add(self, rows: torch.Tensor) -> None:
        """rows: [B, samples, *S]."""
        self.dtype = rows.dtype
        self.first = self.first + rows.sum(dim=1, dtype=torch.float64)
        self.second = self.second + rows.double().square().sum(dim=1)

    def result(self, nt_type: str, samples: int) -> torch.Tensor:
        assert isinstance(self.first, torch.Tensor)
        assert isinstance(self.second, torch.Tensor)
        mean, square = self.first / samples, self.second / samples
        chosen = {"smoothgrad": mean, "smoothgrad_sq": square, "vargrad": (square - mean.square()).clamp(min=0)}
        return chosen[nt_type].to(self.dtype)


def _repeated(value: Any, batch: int, count: int) -> Any:
    """Arguments for ``count`` copies of each of ``batch`` images: what has an entry per image is repeated."""
    if isinstance(value, dict):
        return {key: _repeated(entry, batch, count) for key, entry in value.items()}
    if isinstance(value, tuple) and any(isinstance(entry, torch.Tensor) for entry in value):
        return tuple(_repeated(entry, batch, count) for entry in value)
    if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == batch:
        return value.repeat_interleave(count, dim=0)
    if isinstance(value, list) and len(value) == batch:
        return [entry for entry in value for _ in range(count)]
    return value
