"""How far a map must move, in the norm of a `Deflation`, to change its top-K set: branch and bound over two numbers."""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from robattr_fast.certificates.moments.deflation import Deflation
from robattr_fast.certificates.moments.rounding import EPS, INWARD

_SIZES = 1024
_TOLERANCE = 0.03  # of the squared distance that is given away
_EVALUATIONS = 400  # photographs take some hundred
_NEWTON_STEPS = 40


class DeflatedCost:
    """Lower bounds on cost_W(s): the least ||W d||^2 of all d such that some top-K of p^ + d lacks at least s of S.

    S is the top-K of p^, ties to the lowest index. ``sizes``, ``costs``: int64 and float64 ``[<= 1024]``, neither
    falling; the bound for s between two sizes is that of the smaller one. With u_j = sqrt(1 - w_j^2) v_j,

        ||W d||^2 = min over c of  sum_j w_j^2 c_j^2 + ||d - sum_j c_j u_j||^2,

    a quadratic function of c whose second derivative is 2 I, so that, cost(s; .) being that of T7 with S as the set
    that leaves, all d whose minimum lies in a square of centre c and half-width h have

        ||W d||^2 >= cost(s; p^ + sum_j c_j u_j) + sum_j (w_j^2 c_j^2 - h^2).

    Squares are quartered until the bound is tight.
    """

    def __init__(self, mean: Tensor, k: int, deflation: Deflation, least: float = 0.0) -> None:
        """mean: p^, float64 ``[n]``. least: a distance below which tight bounds are of no use."""
        if mean.dim() != 1 or mean.dtype != torch.float64:
            raise ValueError(f"mean must be float64 [n], got {mean.dtype} {list(mean.shape)}")
        if not 1 <= k <= len(mean) // 2:
            raise ValueError(f"k must be between 1 and n//2 = {len(mean) // 2}, got {k}")
        self.k = k
        self.sizes = np.unique(np.round(np.linspace(1, k, min(_SIZES, k))).astype(np.int64))
        displayed = mean.numpy()
        inside = np.zeros(len(mean), dtype=bool)
        inside[np.argsort(-displayed, kind="stable")[:k]] = True
        self._squares = np.array(deflation.squares)
        moves = deflation.basis * np.sqrt(1 - self._squares)[:, None]
        self._parts = [(displayed[part], moves[:, part]) for part in (inside, ~inside)]
        self.costs = self._search(least)

    def overlap(self, distance: float) -> int:
        """How many of the top K stay, for every map p^ + d with ||W d|| at most ``distance``."""
        first = int(np.searchsorted(self.costs, distance**2 * (1 + 4 * EPS), side="right"))
        return 0 if first == len(self.sizes) else self.k - int(self.sizes[first]) + 1

    def distance(self, overlap: int) -> float:
        """Every d shorter than this, by ||W d||, keeps ``overlap`` of the top K; inf if every d does."""
        leavers = self.k - overlap + 1
        if leavers > self.k:
            return math.inf
        first = int(np.searchsorted(self.sizes, leavers, side="right")) - 1
        return 0.0 if first < 0 else math.sqrt(self.costs[first]) * INWARD

    def _search(self, least: float) -> np.ndarray:
        rank = len(self._squares)
        attained = self._cost(np.zeros(rank))
        # Outside of this square the coordinates v_j . d = c_j / sqrt(1 - w_j^2) alone make ||W d||^2 exceed all costs.
        reach = np.sqrt(attained.max() * (1 - self._squares) / self._squares)
        cells = [(np.zeros(rank), float(reach.max()))]
        bounds = np.maximum(attained - rank * cells[0][1] ** 2, 0.0)[None]
        evaluations = 1
        while True:
            lowest = bounds.min(0)
            wanted = (attained > least**2) & (lowest < (1 - _TOLERANCE) * attained)
            if not wanted.any() or evaluations >= _EVALUATIONS:
                return np.maximum.accumulate(np.minimum(lowest, attained)) * INWARD
            ratio = np.where(wanted, lowest / np.where(wanted, attained, 1.0), math.inf)
            split = int(bounds[:, int(ratio.argmin())].argmin())
            (middle, half), parent = cells.pop(split), bounds[split]
            kept = [np.delete(bounds, split, axis=0)]
            half /= 2
            for signs in itertools.product((-1, 1), repeat=rank):
                centre = middle + half * np.array(signs)
                outside = np.maximum(np.abs(centre) - half, 0.0) ** 2 / (1 - self._squares)
                if (nearest := float(self._squares @ outside)) > attained.max():
                    continue
                cost = self._cost(centre) + self._squares @ centre**2
                evaluations += 1
                attained = np.minimum(attained, cost)
                cells.append((centre, half))
                kept.append(np.maximum(np.maximum(cost - rank * half**2, nearest), parent)[None])
            bounds = np.concatenate(kept)

    def _cost(self, c: np.ndarray) -> np.ndarray:
        """cost(s; p^ + sum_j c_j u_j) for all sizes, the displayed set staying what it is."""
        (leaving, along), (entering, across) = self._parts
        leaving, entering = leaving + c @ along, -(entering + c @ across)
        entering = np.partition(entering, self.k - 1)[: self.k]
        return least_costs(np.sort(leaving), np.sort(entering), self.sizes)


def least_costs(leaving: np.ndarray, entering: np.ndarray, sizes: np.ndarray, tolerance: float = 1e-6) -> np.ndarray:
    """Lower bounds on min over t of sum_{i<s} (leaving_i - t)_+^2 + (entering_i + t)_+^2, for s in ``sizes``.

    leaving, entering: float64, rising (entering with its sign changed); they may cross. Newton's iteration on a convex
    function with a piecewise linear derivative, kept inside a bracket; what is left of the slope is subtracted, at most
    the share ``tolerance`` where the iteration gets so far.
    """
    pivot = (leaving[0] - entering[0]) / 2
    sides = [leaving - pivot, entering + pivot]
    sums = [[np.concatenate(([0.0], np.cumsum(side**power))) for power in (1, 2)] for side in sides]
    last = sizes - 1
    ends = np.stack([sides[0][0] + 0 * last, sides[0][last], -sides[1][0] + 0 * last, -sides[1][last]])
    low, high = ends.min(0), ends.max(0)
    t = np.clip((sums[0][0][sizes] - sums[1][0][sizes]) / (2 * sizes), low, high)
    width = high - low
    for _ in range(_NEWTON_STEPS):
        value, slope, active = _at(t, sides, sums, sizes)
        loss = np.abs(slope) * (high - low)
        enough = loss <= tolerance * value + 1e-18
        if enough.all():
            break
        low, high = np.where(slope <= 0, t, low), np.where(slope >= 0, t, high)
        moved = t - slope / np.maximum(2 * active, 1)
        inside = (moved > low) & (moved < high)
        t = np.where(enough, t, np.where(inside, moved, (low + high) / 2))
    magnitude = sum(
        second[sizes] + 2 * (np.abs(t) + width) * np.maximum.accumulate(np.abs(first))[sizes] + 2 * sizes * t**2
        for first, second in sums
    )
    return np.maximum(value - loss - (2 * sizes + 32) * EPS * magnitude, 0.0)


def _at(t: np.ndarray, sides: list, sums: list, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, derivative and number of terms that are not 0 of the function of `least_costs` at t."""
    value, slope, active = np.zeros(len(t)), np.zeros(len(t)), np.zeros(len(t), dtype=np.int64)
    for sign, side, (first, second) in zip((1, -1), sides, sums, strict=True):
        below = np.minimum(np.searchsorted(side, sign * t, side="right"), sizes)
        count = sizes - below
        linear, square = first[sizes] - first[below], second[sizes] - second[below]
        value = value + square - 2 * sign * t * linear + count * t**2
        slope = slope + 2 * (count * t - sign * linear)
        active = active + count
    return value, slope, active
