"""Attacks on attributions: the map moves as far as it can, the prediction stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from robattr_fast import model as _model
from robattr_fast.attacks.ascent import Plan, ascend
from robattr_fast.attacks.geometry import (
    Ball,
    Bound,
    check_start,
    default_step,
    image_ids,
    normals_of,
    working_dtype,
)
from robattr_fast.attacks.maps import Attribution, Explained, resolved
from robattr_fast.attacks.objectives import Measured, Objective
from robattr_fast.attacks.problem import Aim, AttackResult, MapProblem
from robattr_fast.attacks.surrogate import Softplus
from robattr_fast.attributions.contract import recording
from robattr_fast.model.folding import fold_batchnorm
from robattr_fast.ops import _check
from robattr_fast.sampling.arguments import check_images, check_target

KEEPS = ("label", "output", None)

_ROWS = {"cpu": 8}
_ROWS_ELSEWHERE = 32
_GROUP = 4  # passes whose rows are held at a time


class Sweep(NamedTuple):
    """An attack at growing radii."""

    radii: tuple[float, ...]
    results: tuple[AttackResult, ...]

    @property
    def value(self) -> torch.Tensor:
        """float64 [R, B]."""
        return torch.stack([result.value for result in self.results])


class AttributionPGD:
    """Projected gradient ascent on how far an attribution moves, each image by itself.

    Args:
        model: eval-mode module that returns logits [N, classes]; it is attacked on a private copy. Normalisation
            belongs inside, so that radii are in the units of the images.
        explain: "gradient", "input_x_gradient", "ig", "smoothgrad", "sparsified", or any of `robattr_fast.attributions`
            or a callable of that form: (model, x, target, create_graph=False) -> maps [B, *M], each of its image alone.
        objective: one of `robattr_fast.attacks`: TopK, MassCenter, Region, TargetMap, Cosine, Distance.
        explain_options: keywords of ``explain``, as sigma and samples of smoothgrad.
        norm: "l2" or "linf".
        eps: radius of the ball, in the units of the images; may be inf.
        steps: moves; 0: the start is judged.
        step_size: length of a move, in ``norm``; None: 2.5 eps / steps.
        restarts: starts per image; the best counts.
        start: "sphere" (norm eps), "ball" (uniform), "zero" (the image itself), "curved" (the direction, and its
            opposite, in which the map moves most at first: power iteration), or images [B, *S].
        bounds: (low, high) of valid images, numbers or tensors; None: no box.
        surrogate: `Softplus`: directions by the same weights with softplus for ReLU. "auto": where the model has any.
            None: never. What is kept and returned is judged by the model itself.
        keep: "label": the prediction of the image stays the one it is; "output": that, and no probability moves by more
            than ``tolerance``; None: it may change.
        tolerance: see ``keep``.
        output_weight: how much the mean squared change of the probabilities counts against the objective (`TargetMap`:
            against the mean squared error of the maps).
        measure: name of a metric that decides instead of the objective's own: kendall, spearman, cosine, ssim,
            centre_shift.
        seed: of starts and random directions. An image's own depend on its values, not on its place.
        batch_size: rows of a pass (an image has one per restart); None: 8 on a CPU, else 32. Of smoothed maps a pass
            holds the samples of one image.
        tries, halvings, rule, scale, decay: see `robattr_fast.attacks.ascent.Plan`.

    What is found for an image depends on nothing beside it: the same bits alone or in any batch. (With another
    ``batch_size`` a model may round differently.)

    Raises:
        TypeError, ValueError: a bad argument. ModelError: a model that cannot be attacked; among others one whose maps
        have no derivative, which names the remedy. NonFiniteError: a NaN or infinite map; it names the image.
    """

    def __init__(
        self,
        model: nn.Module,
        explain: str | Attribution = "gradient",
        objective: Objective | None = None,
        *,
        explain_options: Mapping[str, Any] | None = None,
        norm: str = "l2",
        eps: float = 0.5,
        steps: int = 20,
        step_size: float | None = None,
        restarts: int = 5,
        start: str | torch.Tensor = "sphere",
        bounds: tuple[Bound, Bound] | None = (0.0, 1.0),
        surrogate: Softplus | str | None = "auto",
        keep: str | None = "label",
        tolerance: float = 0.1,
        output_weight: float = 0.0,
        measure: str | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        tries: int = 10,
        halvings: int = 10,
        rule: str = "steepest",
        scale: str = "each",
        decay: str | None = None,
    ) -> None:
        if not isinstance(objective, Objective):
            raise TypeError(f"objective: got {type(objective).__name__}, expected one of robattr_fast.attacks")
        if not (surrogate is None or surrogate == "auto" or isinstance(surrogate, Softplus)):
            raise ValueError(f"surrogate: got {surrogate!r}, expected 'auto', None or Softplus(beta)")
        if keep not in KEEPS:
            raise ValueError(f"keep: got {keep!r}, expected 'label', 'output' or None")
        check_start(start)
        self.ball = Ball(norm, eps, bounds)
        self.plan = Plan(
            steps=_check.integer("steps", steps, 0, 2**20 - 1),
            step_size=default_step(eps, steps) if step_size is None else step_size,
            restarts=restarts,
            start=start,
            tries=tries,
            halvings=halvings,
            rule=rule,
            scale=scale,
            decay=decay,
            seed=seed,
            batch_size=1 if batch_size is None else batch_size,
        )
        self.model = model
        self.objective = objective if measure is None else Measured(objective, measure)
        self.explained = Explained(resolved(explain, explain_options))
        self.surrogate = surrogate
        self.keep, self.tolerance = keep, _check.positive("tolerance", tolerance)
        self.output_weight = output_weight
        self._batch_size = batch_size
        self._default_step = step_size is None

    def __call__(self, images: torch.Tensor, labels: int | Sequence[int] | torch.Tensor | None = None) -> torch.Tensor:
        """The perturbed images [B, *S]: `run(images, labels).images`."""
        return self.run(images, labels).images

    def run(self, images: torch.Tensor, labels: int | Sequence[int] | torch.Tensor | None = None) -> AttackResult:
        """Attack images [B, *S].

        labels: class or classes [B] that are explained; None: the model's own predictions.
        """
        return self._run(images, labels, None)

    def sweep(
        self, images: torch.Tensor, eps: Sequence[float], labels: int | Sequence[int] | torch.Tensor | None = None
    ) -> Sweep:
        """Attack at each of several radii, in rising order: each starts from what the one before found, too.

        The measure never gets worse from one radius to the next.
        """
        radii = sorted(float(radius) for radius in eps)
        results: list[AttackResult] = []
        for radius in radii:
            ball = replace(self.ball, radius=radius)
            step = default_step(radius, self.plan.steps) if self._default_step else self.plan.step_size
            attack = self._with(ball, replace(self.plan, step_size=step))
            results.append(attack._run(images, labels, results[-1] if results else None))
        return Sweep(tuple(radii), tuple(results))

    def _with(self, ball: Ball, plan: Plan) -> AttributionPGD:
        other = object.__new__(type(self))
        vars(other).update(vars(self), ball=ball, plan=plan)
        return other

    def _run(self, images: torch.Tensor, labels: Any, earlier: AttackResult | None) -> AttackResult:
        check_images(images)
        self.ball.check(images)
        with recording():
            x = images.detach().clone()
            true = _model.private_copy(self.model)
            # A callable may look at the model's layers: it gets them as they are.
            fast = true
            if self.explained.folds:
                fast, _ = fold_batchnorm(_model.private_copy(self.model), x[:2])
            rows = self._batch_size or _ROWS.get(x.device.type, _ROWS_ELSEWHERE)
            plan = replace(self.plan, batch_size=1 if self.explained.noisy else rows)
            at_once = max(1, _GROUP * rows // plan.restarts)
            target = check_target(None if labels is None else labels, x)
            parts = [
                self._group(
                    (true, fast),
                    x[first : first + at_once],
                    None if target is None else target[first : first + at_once],
                    plan,
                    first,
                    earlier,
                )
                for first in range(0, len(x), at_once)
            ]
        return AttackResult(**{name: _joined([vars(part)[name] for part in parts]) for name in vars(parts[0])})

    def _group(
        self,
        models: tuple[nn.Module, nn.Module],
        x: torch.Tensor,
        target: torch.Tensor | None,
        plan: Plan,
        first: int,
        earlier: AttackResult | None,
    ) -> AttackResult:
        """Images from ``first`` on."""
        ids = image_ids(x)
        aim = Aim(
            self.objective,
            self.explained,
            self.surrogate,
            self.keep,
            self.tolerance,
            self.output_weight,
            self.plan,
        )
        maps = MapProblem(aim, models, x, target, plan.batch_size, first)
        if isinstance(plan.start, torch.Tensor):
            if plan.start.shape[1:] != x.shape[1:]:
                raise ValueError(f"start: got shape {tuple(plan.start.shape)}, expected that of the images")
            plan = replace(plan, start=plan.start[first : first + len(x)].to(x.device))
        known = maps.sign * maps.measure(maps.before, torch.arange(len(x), device=x.device))
        before = None if earlier is None else earlier.images[first : first + len(x)]
        if before is not None:  # the first restart goes on from it
            starts = torch.full((len(x), plan.restarts, *x.shape[1:]), torch.nan, dtype=working_dtype(x))
            starts = starts.to(x.device)
            starts[:, 0] = before.to(starts.dtype) - x.to(starts.dtype)
            plan = replace(plan, start="sphere" if isinstance(plan.start, torch.Tensor) else plan.start)
            climbed = ascend(maps, x, ids, self.ball, plan, known=known, starts=starts.flatten(0, 1))
        elif plan.start == "curved":
            starts = self._curved(maps, x, ids, plan)
            climbed = ascend(maps, x, ids, self.ball, plan, known=known, starts=starts)
        else:
            climbed = ascend(maps, x, ids, self.ball, plan, known=known)
        return maps.result(climbed, self.ball, plan.restarts, before)

    def _curved(self, maps: MapProblem, x: torch.Tensor, ids: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Two starts along the direction that moves the map most, the others left to chance."""
        seeded = normals_of(x, ids, torch.full_like(ids, 2**31 - 1), plan.seed).view_as(x)
        unit = maps.most_moving(self.ball, seeded)
        starts = torch.full((len(x), plan.restarts, *x.shape[1:]), torch.nan, dtype=unit.dtype, device=x.device)
        for restart in range(min(2, plan.restarts)):
            starts[:, restart] = (-1) ** restart * self.ball.radius * unit
        return starts.flatten(0, 1)


def _joined(values: list[Any]) -> Any:
    return None if values[0] is None else torch.cat(values)
