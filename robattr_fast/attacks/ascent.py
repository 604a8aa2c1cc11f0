"""One projected ascent, for whatever is to be raised: each image by itself, its best feasible point kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from robattr_fast.attacks.geometry import Ball, normals_of, scaled, working_dtype
from robattr_fast.ops import _check

RULES = ("steepest", "adam", "random")
SCALES = ("each", "first")
DECAYS = (None, "harmonic")

_TRIES = 2**10  # of a start
_WALK = 2**31  # indices of a random walk: far from those of starts
_ADAM = (0.9, 0.999, 1e-8)


@dataclass(frozen=True)
class Plan:
    """How to climb.

    Attributes:
        steps: moves from the start.
        step_size: length of a move, in the norm of the ball (rule "adam": its learning rate).
        restarts: starts per image.
        start: "sphere", "ball", "zero", "curved" or one point per image.
        tries: draws of a random start until one is feasible; then the image itself is the start.
        halvings: how often a move that leads out of the feasible set is halved; then the row ends.
        rule: "steepest" (the gradient of norm 1; linf: its sign), "adam", or "random": directions at random.
        scale: "each": every gradient is normalised; "first": each is divided by the norm of the first.
        decay: "harmonic": move t is scaled by 1 / t.
        seed: of starts and random directions.
        batch_size: rows of one pass.
    """

    steps: int
    step_size: float
    restarts: int = 1
    start: str | torch.Tensor = "zero"
    tries: int = 1
    halvings: int = 10
    rule: str = "steepest"
    scale: str = "each"
    decay: str | None = None
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, low, high in (("steps", 0, 2**20 - 1), ("restarts", 1, 2**10), ("tries", 1, _TRIES)):
            _check.integer(name, getattr(self, name), low, high)
        _check.integer("halvings", self.halvings, 0, 1000)
        _check.integer("batch_size", self.batch_size, 1, 2**20)
        _check.seed(self.seed)
        for name, takes in (("rule", RULES), ("scale", SCALES), ("decay", DECAYS)):
            if getattr(self, name) not in takes:
                named = ", ".join(map(repr, takes))
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {named}")
        if not (isinstance(self.step_size, int | float) and math.isfinite(self.step_size) and self.step_size >= 0):
            raise ValueError(f"step_size: got {self.step_size!r}, expected a finite number >= 0")


@dataclass
class Judged:
    """What is known of points [N, *S]."""

    measure: torch.Tensor
    """float64 [N], larger is better."""
    feasible: torch.Tensor
    """bool [N]."""
    gradient: torch.Tensor | None = None
    """Of what is to be raised, [N, *S]; None where it was not asked for."""

    def first(self, rows: int) -> Judged:
        gradient = None if self.gradient is None else self.gradient[:rows]
        return Judged(self.measure[:rows], self.feasible[:rows], gradient)

    @staticmethod
    def joined(parts: list[Judged]) -> Judged:
        gradients = [part.gradient for part in parts if part.gradient is not None]
        return Judged(
            torch.cat([part.measure for part in parts]),
            torch.cat([part.feasible for part in parts]),
            torch.cat(gradients) if gradients else None,
        )


class Problem(Protocol):
    """What is climbed. ``images`` [N] says to which image each point belongs."""

    def judge(self, points: torch.Tensor, images: torch.Tensor, step: int, gradient: bool) -> Judged: ...


@dataclass
class Climbed:
    """Of rows [B * restarts], those of one image one after the other."""

    best: torch.Tensor
    measure: torch.Tensor
    """float64, of the best; that of the image itself where nothing better is feasible."""
    last: torch.Tensor
    last_measure: torch.Tensor
    steps: torch.Tensor
    """int64: moves made."""


def ascend(
    problem: Problem,
    x: torch.Tensor,
    ids: torch.Tensor,
    ball: Ball,
    plan: Plan,
    *,
    known: torch.Tensor,
    starts: torch.Tensor | None = None,
) -> Climbed:
    """Climb from every start of every image.

    What happens to an image depends on it, its id and the plan alone, not on the images beside it: passes always have
    ``batch_size`` rows, filled up with copies, and rows that are done leave.

    Args:
        problem: judges points.
        x: [B, *S], the images.
        ids: int64 [B], of each image in the noise stream.
        known: float64 [B], the measure of the images themselves; NaN: not attacked.
        starts: perturbations [B * restarts, *S]; those of NaN are drawn at random, in the way "sphere". None: all are
            drawn as the plan says.
    """
    rows = torch.arange(len(x) * plan.restarts, device=x.device)
    return _Ascent(problem, x, ids, ball, plan, rows, known, starts).climb()


class _Ascent:
    def __init__(self, problem, x, ids, ball, plan, rows, known, starts) -> None:
        self.problem: Problem = problem
        self.ball: Ball = ball
        self.plan: Plan = plan
        self.image = rows // plan.restarts
        self.restart = rows % plan.restarts
        self.ids = ids.to(x.device)[self.image]
        self.origin = x[self.image]
        self.starts = starts
        dtype = working_dtype(x)
        self.current = self.origin.clone()
        self.gradient = torch.zeros(self.origin.shape, dtype=dtype, device=x.device)
        self.best = self.origin.clone()
        self.measure = known.to(x.device)[self.image]
        self.last_measure = self.measure.clone()
        self.active = rows[~self.measure.isnan()]
        self.length = torch.full((len(rows),), float(plan.step_size), dtype=torch.float64, device=x.device)
        self.steps = torch.zeros_like(rows)
        self.scale: torch.Tensor | None = None
        self.moments = torch.zeros(2, *self.origin.shape, dtype=dtype, device=x.device) if plan.rule == "adam" else None

    def climb(self) -> Climbed:
        plan = self.plan
        self._begin()
        for step in range(1, plan.steps + 1):
            if not len(self.active):
                break
            self._move(step)
        return Climbed(self.best, self.measure, self.current, self.last_measure, self.steps)

    def _begin(self) -> None:
        """Every active row on its first feasible start."""
        plan, pending = self.plan, self.active
        if not len(pending):
            return
        random = isinstance(plan.start, str) and plan.start != "zero"
        for attempt in range(plan.tries if random else 1):
            points = self.ball.point(self.origin[pending], self._start(pending, attempt))
            pending = self._accept(pending, points, self._judged(pending, points, 0))
            if not len(pending):
                return
        self._accept(pending, self.origin[pending], self._judged(pending, self.origin[pending], 0))

    def _start(self, rows: torch.Tensor, attempt: int) -> torch.Tensor:
        plan, origin = self.plan, self.origin[rows]
        dtype = working_dtype(origin)
        if isinstance(plan.start, torch.Tensor):
            return (plan.start.to(origin.device)[self.image[rows]].to(dtype) - origin.to(dtype)).view(origin.shape)
        if plan.start == "zero":
            return torch.zeros(origin.shape, dtype=dtype, device=origin.device)
        kind = "ball" if plan.start == "ball" else "sphere"
        index = self.restart[rows] * _TRIES + attempt
        drawn = self.ball.start(kind, normals_of(origin, self.ids[rows], index, plan.seed, extra=2), origin.shape[1:])
        if self.starts is None or attempt:
            return drawn
        given = self.starts[rows].to(dtype)
        return torch.where(given.isnan(), drawn, given)

    def _move(self, step: int) -> None:
        plan, pending = self.plan, self.active
        direction = self._direction(step)
        current = self.current[pending]
        for _ in range(plan.halvings + 1):
            lengths = self.length[pending] / (step if plan.decay == "harmonic" else 1)
            at = torch.searchsorted(self.active, pending)
            delta = (current[at] - self.origin[pending]).to(direction.dtype) + scaled(direction[at], lengths)
            points = self.ball.point(self.origin[pending], delta)
            pending = self._accept(pending, points, self._judged(pending, points, step))
            if not len(pending):
                break
            self.length[pending] /= 2
        if len(pending):
            self.active = self.active[~torch.isin(self.active, pending)]
        self.steps[self.active] += 1

    def _direction(self, step: int) -> torch.Tensor:
        """Of the active rows, [A, *S]."""
        plan, rows = self.plan, self.active
        gradient = self.gradient[rows]
        if plan.rule == "random":
            return self.ball.steepest(self._random(rows, step))
        if self.moments is not None:
            decay, spread, tiny = _ADAM
            first, second = self.moments
            first[rows] = decay * first[rows] + (1 - decay) * gradient
            second[rows] = spread * second[rows] + (1 - spread) * gradient.square()
            root = (second[rows] / (1 - spread**step)).sqrt()
            return first[rows] / (1 - decay**step) / (root + tiny)
        # At a stationary point every direction is as good: a cosine does not change at first around its own map.
        flat = gradient.flatten(1).abs().amax(dim=1) == 0
        if bool(flat.any()):
            gradient[flat] = self._random(rows[flat], step)
        if plan.scale == "each":
            return self.ball.steepest(gradient)
        if self.scale is None:
            self.scale = torch.zeros_like(self.length)
            self.scale[rows] = 1 / self.ball.sizes(gradient).clamp(min=1e-300)
        return scaled(gradient, self.scale[rows])

    def _random(self, rows: torch.Tensor, step: int) -> torch.Tensor:
        index = _WALK + self.restart[rows] * 2**20 + step
        return normals_of(self.origin[rows], self.ids[rows], index, self.plan.seed).view_as(self.origin[rows])

    def _judged(self, rows: torch.Tensor, points: torch.Tensor, step: int) -> Judged:
        """In passes of ``batch_size`` rows."""
        wanted = step < self.plan.steps and self.plan.rule != "random"
        parts: list[Judged] = []
        left = len(rows)
        for block, at in zip(_blocks(rows, self.plan.batch_size), _blocks(points, self.plan.batch_size), strict=True):
            parts.append(self.problem.judge(at, self.image[block], step, wanted).first(left))
            left -= len(block)
        return Judged.joined(parts)

    def _accept(self, rows: torch.Tensor, points: torch.Tensor, judged: Judged) -> torch.Tensor:
        """Feasible points become current, and best where they are; the other rows are returned."""
        kept = judged.feasible
        if bool(kept.all()):
            mine, better = rows, judged.measure > self.measure[rows]
        else:
            mine, points = rows[kept], points[kept]
            better = judged.measure[kept] > self.measure[mine]
        self.current[mine] = points
        self.last_measure[mine] = judged.measure[kept]
        if judged.gradient is not None:
            self.gradient[mine] = judged.gradient[kept].to(self.gradient.dtype)
        self.best[mine[better]] = points[better]
        self.measure[mine[better]] = self.last_measure[mine[better]]
        return rows[~kept]


def _blocks(rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """rows in blocks of ``size``, the last one filled up with copies of its last row."""
    for block in rows.split(size):
        missing = size - len(block)
        yield torch.cat([block, block[-1:].expand(missing, *block.shape[1:])]) if missing else block
