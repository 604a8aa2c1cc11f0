"""The maps of some images and of points around them, as a problem that `ascend` can climb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from robattr_fast import model as _model
from robattr_fast.attacks.ascent import Climbed, Judged, Plan
from robattr_fast.attacks.geometry import Ball, scaled, working_dtype
from robattr_fast.attacks.maps import Explained
from robattr_fast.attacks.objectives import Objective, State
from robattr_fast.attacks.surrogate import Softplus, Surrogate, corners
from robattr_fast.errors import ModelError, NonFiniteError

_POWER_STEPS, _PROBE = 10, 0.05
_RETRY = 2**20  # another draw of noise: behind those of all steps


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, per image; a tensor of one value per image is [B].

    Attributes:
        images: [B, *S], the perturbed images; the image itself where nothing better was feasible.
        before, after: the maps of the images and of the perturbed ones, by the model itself.
        value: float64, the objective's measure of the two (of `TopK` their overlap); NaN for a constant map.
        size: float64, norm of the perturbation.
        success: bool, the map moved by the measure, and all that was to be kept is.
        label_changed: bool, the prediction of the model changed.
        misclassified: bool, the prediction at the image itself is not its label.
        steps: int64, moves of the restart that was best.
        noise_floor: float64, the measure between two maps of the same image with different noise: so far a smoothed map
            moves without an adversary. None for attributions without noise.
    """

    images: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    value: torch.Tensor
    size: torch.Tensor
    success: torch.Tensor
    label_changed: torch.Tensor
    misclassified: torch.Tensor
    steps: torch.Tensor
    noise_floor: torch.Tensor | None


@dataclass(frozen=True)
class Aim:
    """What an attack wants, and what it may not do; the attributes are arguments of `AttributionPGD`."""

    objective: Objective
    explained: Explained
    surrogate: Softplus | str | None
    keep: str | None
    tolerance: float
    output_weight: float
    plan: Plan


class MapProblem:
    """The maps of some images and of points around them, as a problem for `ascend`.

    models: the one that is attacked, which makes the maps and predictions of the result, and one of the same function
    that the ascent uses: with BatchNorm folded, whose second derivative is dear.
    """

    def __init__(
        self,
        aim: Aim,
        models: tuple[nn.Module, nn.Module],
        x: torch.Tensor,
        target: torch.Tensor | None,
        rows: int,
        first: int,
    ) -> None:
        self.aim, self.x, self.rows, self.first = aim, x, rows, first
        self.true, self.model = models
        self.objective, self.explained = aim.objective, aim.explained
        self.sign = 1.0 if self.objective.rises else -1.0
        self.logits = self._by_rows(lambda rows: _model.forward(self.true, rows), x)
        _refuse_probabilities(self.logits)
        classes = self.logits.shape[1]
        if target is not None and not bool(((target >= 0) & (target < classes)).all()):
            raise ValueError(f"labels: got {target.tolist()}, expected classes in [0, {classes})")
        self.predicted = self.logits.argmax(dim=1)
        self.target = self.predicted if target is None else target
        self.surrogate = self._surrogate()
        self.before = self.maps_of(x, torch.arange(len(x), device=x.device))
        self.state: State = self.objective.prepare(self.before)
        wanted = (aim.plan.steps > 0 and aim.plan.rule != "random") or aim.plan.start == "curved"
        self.guides = self.explained.relaxed(self.model, x, self.target) if wanted else []
        self._derivative_seen = not wanted

    def _by_rows(self, work: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([work(_filled(block, self.rows))[: len(block)] for block in x.split(self.rows)])

    def _surrogate(self) -> Surrogate | None:
        settings = self.aim.surrogate
        plan = self.aim.plan
        unused = (plan.steps == 0 or plan.rule == "random") and plan.start != "curved"
        if settings is None or unused or not corners(self.model, self.x[:1]):
            return None
        found = Surrogate(self.model, settings if isinstance(settings, Softplus) else Softplus())
        found.check(self.model, self.x[:1])
        return found

    def maps_of(self, points: torch.Tensor, images: torch.Tensor, draw: int = 0) -> torch.Tensor:
        """Maps [N, *M] of the model itself, detached."""
        parts = []
        for block, of in zip(points.split(self.rows), images.split(self.rows), strict=True):
            target = _filled(self.target[of], self.rows)
            maps, _ = self.explained.maps(self.true, _filled(block, self.rows), target, False, draw)
            parts.append(self._finite(maps.detach(), of)[: len(block)])
        return torch.cat(parts)

    def _finite(self, maps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        finite = torch.isfinite(maps.flatten(1).sum(dim=1, dtype=torch.float64))[: len(images)]
        if not bool(finite.all()):
            image = self.first + int(images[~finite][0])
            raise NonFiniteError(f"model: image {image} has a NaN or infinite map")
        return maps

    def state_of(self, images: torch.Tensor) -> State:
        return {name: tensor[images] for name, tensor in self.state.items()}

    def measure(self, maps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return self.objective.measure(maps, self.state_of(images))

    def kept(self, logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Whether what is to be kept is, bool [N]."""
        if self.aim.keep is None:
            return torch.ones_like(images, dtype=torch.bool)
        same = logits.argmax(dim=1) == self.predicted[images]
        if self.aim.keep == "output":
            moved = logits.double().softmax(dim=1) - self.logits[images].double().softmax(dim=1)
            same &= moved.abs().amax(dim=1) <= self.aim.tolerance
        return same

    def judge(self, points: torch.Tensor, images: torch.Tensor, step: int, gradient: bool) -> Judged:
        progress = step / max(1, self.aim.plan.steps)
        # Guide and measure are one pass where the model itself has derivatives.
        direct = gradient and self.surrogate is None and self.guides[int(images[0])] is self.explained
        if self.explained.noisy and self.aim.keep is not None:  # a map is dear, a label is not
            with torch.no_grad():
                feasible = self.kept(_model.forward(self.model, points.clone()), images)
            if not bool(feasible.any()):
                nothing = torch.full(feasible.shape, -torch.inf, dtype=torch.float64, device=points.device)
                return Judged(nothing, feasible, torch.zeros_like(points) if gradient else None)
        leaf = points.detach().clone().requires_grad_(gradient)
        with sdpa_kernel(SDPBackend.MATH):
            maps, logits = self.explained.maps(self.model, leaf, self.target[images], direct, 1 + step)
            if logits is None and (self.aim.keep is not None and not self.explained.noisy):
                with torch.no_grad():
                    logits = _model.forward(self.model, points.clone())
            if logits is not None:
                feasible = self.kept(logits.detach(), images)
            elif self.aim.keep is None:
                feasible = torch.ones_like(images, dtype=torch.bool)
            measured = self._finite(maps.detach(), images)
            measure = self.sign * self.measure(measured, images).nan_to_num(nan=-self.sign * torch.inf)
            if not gradient:
                return Judged(measure, feasible)
            if not direct:
                leaf = points.detach().clone().requires_grad_()
                model = self.model if self.surrogate is None else self.surrogate.sharpen(progress)
                guide = self.guides[int(images[0])] if self.explained.noisy else self.explained
                maps, logits = guide.maps(model, leaf, self.target[images], True, 1 + step)
            return Judged(measure, feasible, self._gradient(maps, leaf, images, logits))

    def _gradient(
        self, maps: torch.Tensor, leaf: torch.Tensor, images: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.Tensor:
        """Of the objective's value, by the model that made ``maps`` from ``leaf``."""
        state = self.state_of(images)
        value = self.objective.value(maps, state)
        if self.aim.output_weight:
            model = self.model if self.surrogate is None else self.surrogate.model
            logits = _model.forward(model, leaf) if logits is None else logits
            moved = logits.float().softmax(dim=1) - self.logits[images].float().softmax(dim=1)
            value = value - self.aim.output_weight * moved.square().mean(dim=1) / self.objective.unit(state)
        if not value.requires_grad:
            self._no_derivative(images)
        try:
            (found,) = torch.autograd.grad(value.sum(), leaf, retain_graph=not self._derivative_seen, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            if _model.is_out_of_memory(error):
                raise
            raise ModelError(_undifferentiable(error)) from error
        if found is None:
            self._no_derivative(images)
        size = found.detach().abs().flatten(1).amax(dim=1)
        if not bool(torch.isfinite(size).all()):
            image = self.first + int(images[~torch.isfinite(size)][0])
            raise NonFiniteError(f"model: image {image} has a NaN or infinite derivative of its map")
        if not self._derivative_seen:
            self._check_derivative(maps, leaf, images, size)
        return found

    def _check_derivative(
        self, maps: torch.Tensor, leaf: torch.Tensor, images: torch.Tensor, size: torch.Tensor
    ) -> None:
        """Where the objective's gradient is exactly 0: is it the objective's, at a stationary point, or the map's?"""
        if bool((size > 0).any()):
            self._derivative_seen = True
            return
        weights = torch.linspace(-1, 2, maps.numel(), dtype=maps.dtype, device=maps.device).view_as(maps)
        (found,) = torch.autograd.grad((maps * weights).sum(), leaf, allow_unused=True, retain_graph=True)
        zero = maps.detach().abs().flatten(1).amax(dim=1) == 0
        if found is None or bool(((found.abs().flatten(1).amax(dim=1) == 0) & ~zero).all()):
            self._no_derivative(images)
        self._derivative_seen = True

    def _no_derivative(self, images: torch.Tensor) -> None:
        known = (
            "surrogate=Softplus() with smooth activations in place of its ReLUs"
            if self.aim.surrogate is None
            else "a model with smooth activations (no corner was found that could be made smooth)"
        )
        raise ModelError(
            f"model: the derivative of the map of image {self.first + int(images[0])} is exactly 0 although the map is "
            "not: the network is linear piece by piece (or an operator hides its second derivative), and an ascent "
            f"would stand still; pass {known}, or rule='random'"
        )

    def most_moving(self, ball: Ball, direction: torch.Tensor) -> torch.Tensor:
        """Directions [B, *S] of norm 1 in which the maps move most at first: power iteration on J^T J.

        J, the derivative of the map, is the Hessian of the logit where the map is its gradient. J v is a difference.
        """
        model = self.model if self.surrogate is None else self.surrogate.sharpen(1.0)
        image = torch.arange(len(self.x), device=self.x.device)
        sphere = replace(ball, norm="l2")
        found = []
        for block, of in zip(direction.split(self.rows), image.split(self.rows), strict=True):
            count, block, of = len(of), _filled(block, self.rows), _filled(of, self.rows)
            unit = sphere.steepest(block)
            x, target = self.x[of], self.target[of]
            guide = self.guides[int(of[0])] if self.explained.noisy else self.explained
            reach = _PROBE * (ball.radius if ball.radius not in (0.0, torch.inf) else 1.0)
            for _ in range(_POWER_STEPS):
                with sdpa_kernel(SDPBackend.MATH):
                    leaf = x.detach().clone().requires_grad_()
                    maps, _ = guide.maps(model, leaf, target, True)
                    there = (x.to(unit.dtype) + reach * unit).to(x.dtype)
                    moved = guide.maps(model, there, target, False)[0].detach() - maps.detach()
                    largest = moved.flatten(1).abs().amax(dim=1)
                    moved = scaled(moved, torch.where(largest > 0, 1 / largest, 0.0))
                    try:
                        (pulled,) = torch.autograd.grad((maps * moved).sum(), leaf, allow_unused=True)
                    except (RuntimeError, NotImplementedError) as error:
                        raise ModelError(_undifferentiable(error)) from error
                if pulled is None or not bool(pulled.any()):
                    self._no_derivative(of)
                unit = sphere.steepest(pulled.to(unit.dtype))
            found.append(ball.steepest(unit)[:count])
        return torch.cat(found)

    def result(self, climbed: Climbed, ball: Ball, restarts: int, earlier: torch.Tensor | None) -> AttackResult:
        x, image = self.x, torch.arange(len(self.x), device=self.x.device)
        best = climbed.best.view(len(x), restarts, *x.shape[1:])
        measure = climbed.measure.view(len(x), restarts)
        steps = climbed.steps.view(len(x), restarts)
        if self.explained.noisy:  # what the steps' own noise liked best is judged again, all alike
            if earlier is not None:
                best = torch.cat([best, earlier[:, None]], dim=1)
                steps = torch.cat([steps, torch.zeros_like(steps[:, :1])], dim=1)
            measure = torch.stack(
                [self.sign * self.measure(self.maps_of(best[:, i], image), image) for i in range(best.shape[1])], dim=1
            )
        chosen = measure.nan_to_num(nan=-torch.inf).argmax(dim=1)
        points = best[image, chosen]
        itself = self.sign * self.measure(self.before, image)
        if self.explained.noisy:
            points = torch.where(_wide(measure[image, chosen] > itself, points), points, x)
        after = self.maps_of(points, image)
        value = self.measure(after, image)
        logits = self._by_rows(lambda rows: _model.forward(self.true, rows), points)
        noise = None
        if self.explained.noisy:
            noise = self.measure(self.maps_of(x, image, draw=_RETRY), image)
        return AttackResult(
            images=points,
            before=self.before,
            after=after,
            value=value,
            size=ball.sizes(points.to(working_dtype(x)) - x.to(working_dtype(x))),
            success=(self.sign * value > itself) & self.kept(logits, image),
            label_changed=logits.argmax(dim=1) != self.predicted,
            misclassified=self.predicted != self.target,
            steps=steps[image, chosen],
            noise_floor=noise,
        )


def _wide(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return mask.view(-1, *[1] * (like.dim() - 1))


def _filled(block: torch.Tensor, rows: int) -> torch.Tensor:
    """The block with copies of its last row, ``rows`` in all: a model may round differently at another size."""
    missing = rows - len(block)
    return torch.cat([block, block[-1:].expand(missing, *block.shape[1:])]) if missing else block


def _refuse_probabilities(logits: torch.Tensor) -> None:
    if logits.shape[1] < 2:
        return
    sums = logits.double().sum(dim=1)
    tolerance = 4 * torch.finfo(logits.dtype).eps * logits.shape[1]
    if bool((logits >= 0).all()) and bool(((sums - 1).abs() <= max(1e-3, tolerance)).all()):
        raise ModelError("model: its outputs are probabilities (not negative, of sum 1), expected logits")


def _undifferentiable(error: Exception) -> str:
    remedy = "use operators that have a second derivative"
    if "attention" in str(error):
        remedy = "call it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or use rf.linear_attention"
    return f"model: its maps cannot be differentiated; {remedy} ({error})"
