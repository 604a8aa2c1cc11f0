"""The second-moment certificate (theorem T7): how far the elements of a map can move *together*.

p^ is the displayed map, the mean of q samples h_t = h(x + e_t), e_t ~ N(0, sigma^2 I); p its expectation, p~ the
expectation at a perturbed x~ with ||x~ - x|| <= radius, Sigma the covariance of h. All statements below hold for every
k and radius at once, on one event of probability at least 1 - alpha. Proofs: docs/second-moments.md.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robattr_fast.certificates.moments.concentration import (
    DEFLATED_SHARE,
    ERROR_SHARE,
    FROBENIUS_SHARE,
    SPECTRAL_SHARE,
    GramSummary,
    block_rows,
    error_bound,
    frobenius_bound,
    look_schedule,
    mean_map,
    rows_in_blocks,
    spectral_bound,
    trace_estimate,
)
from robattr_fast.certificates.moments.deflation import DeflatedSummary
from robattr_fast.certificates.moments.least_moves import least_costs
from robattr_fast.certificates.moments.rounding import EPS, INWARD


@dataclass(frozen=True)
class SecondMoments:
    """What the samples of one image prove about the distance of its maps.

    sigma: of the noise, in units of x. norm: ||p^||. error: >= ||p^ - p|| (e_q). spectral: >= the largest eigenvalue
    of Sigma (lambda_u). frobenius: >= ||Sigma||_F (F_u). trace: the estimate of its trace. k_tau: the most elements of
    a sample that are not zero. samples: the scheduled look q that these belong to. deflated: >= the largest eigenvalue
    of W Sigma W, W that of the `Deflation`; None if there is none.
    """

    sigma: float
    samples: int
    k_tau: int
    norm: float
    trace: float
    error: float
    spectral: float
    frobenius: float
    deflated: float | None = None

    def smoothed_distance(self, radius: float) -> float:
        """Upper bound on ||p~ - p||: between the smoothed maps themselves."""
        _check_radius(radius)
        return min(_divergence(radius / self.sigma) * math.sqrt(self.spectral), math.sqrt(2 * self.k_tau))

    def distance(self, radius: float) -> float:
        """Upper bound on ||p~ - p^||, from the displayed map to the smoothed map at x~ (the ball M)."""
        return min(self.error + self.smoothed_distance(radius), math.sqrt(self.norm**2 + self.k_tau))

    def cosine(self, radius: float) -> float:
        """Lower bound on the cosine of the displayed map and the smoothed map at x~; 0 where nothing is proved."""
        return _cosine(self.distance(radius), self.norm)

    def smoothed_cosine(self, radius: float) -> float:
        """Lower bound on the cosine of the smoothed maps at x and x~; 0 where nothing is proved."""
        return _cosine(self.smoothed_distance(radius), self.norm - self.error)

    def deflated_distance(self, radius: float) -> float:
        """Upper bound on ||W (p~ - p^)||; inf without a deflation."""
        if self.deflated is None:
            return math.inf
        _check_radius(radius)
        moved = self.error + _divergence(radius / self.sigma) * math.sqrt(self.deflated)
        return min(moved, math.sqrt(self.norm**2 + self.k_tau))

    def radius(self, distance: float) -> float:
        """The largest radius whose :meth:`distance` stays below ``distance``; 0 if none does, inf if all do."""
        return self._radius(distance, self.spectral)

    def deflated_radius(self, distance: float) -> float:
        """The same of :meth:`deflated_distance`."""
        return 0.0 if self.deflated is None else self._radius(distance, self.deflated)

    def _radius(self, distance: float, eigenvalue: float) -> float:
        if distance <= self.error:
            return 0.0
        if distance > math.sqrt(self.norm**2 + self.k_tau) or eigenvalue == 0:
            return math.inf
        slope = (distance - self.error) / math.sqrt(eigenvalue)
        return self.sigma * math.sqrt(math.log1p(slope**2)) * INWARD


def second_moments(
    counts: Tensor,
    samples: int,
    summary: GramSummary,
    *,
    planned: int,
    retained: int,
    k_tau: int,
    sigma: float,
    alpha: float,
    invalid: int = 0,
    invalid_rows: int = 0,
    deflated: DeflatedSummary | None = None,
) -> SecondMoments:
    """Evaluates T7 at one scheduled look.

    counts: int ``[n, L]``, levels 1..L met in the first ``samples`` samples, a look of ``look_schedule(planned)``.
    summary: of the first `rows_in_blocks` samples, ``retained`` at a time. deflated: of those after the pilots. alpha:
    the moment part of the ledger; it pays for all looks, radii and k. invalid, invalid_rows: how many of the
    ``samples``, and of the rows, were not finite and stand for unknown maps of at most ``k_tau`` nonzero elements
    (``on_nonfinite="abstain"``; a deflation is then left aside); leave them 0 where a non-finite sample counts as the
    map 0.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, got {sigma}")
    if not 1 <= k_tau <= counts.shape[0]:
        raise ValueError(f"k_tau must be between 1 and n = {counts.shape[0]}, got {k_tau}")
    looks = look_schedule(planned)
    if samples not in looks:
        raise ValueError(f"samples must be a scheduled look, one of {sorted(looks)}, got {samples}")
    rows = rows_in_blocks(samples, planned, retained)
    blocks = max(1, rows // block_rows(planned, retained))
    if (summary.rows, summary.blocks) != (rows, blocks):
        raise ValueError(
            f"summary must be that of the first {rows} samples in {blocks} blocks, "
            f"got {summary.rows} in {summary.blocks}"
        )
    if not 0 <= invalid_rows <= invalid <= samples:
        raise ValueError(f"invalid_rows <= invalid <= samples must hold, got {invalid_rows}, {invalid}, {samples}")

    error_alpha, spectral_alpha, deflated_alpha, frobenius_alpha = (
        alpha * share * looks[samples] for share in (ERROR_SHARE, SPECTRAL_SHARE, DEFLATED_SHARE, FROBENIUS_SHARE)
    )

    norm = float(mean_map(counts, samples).square().sum().sqrt())
    # Centres p^ and p^_m: an unknown row adds at most its distance from them, squared.
    trace = trace_estimate(counts, samples) + invalid * (k_tau + norm**2) / (samples - 1)
    unknown = invalid_rows / rows
    eigenvalue = summary.eigenvalue + unknown * (k_tau + summary.norm2)
    fourth = summary.fourth + unknown * (k_tau + summary.norm2) ** 2
    # All of them may lie in one block, whose centre they then move.
    shift = min(1.0, invalid_rows / summary.block_rows) * math.sqrt(k_tau)
    missing = invalid / samples * math.sqrt(k_tau)

    # B^2 = k_tau + ||p||^2, and ||p|| <= ||p^|| + error: each round starts from a bound that already holds.
    sure = 2.0 * k_tau
    for _ in range(20):
        spectral = spectral_bound(eigenvalue, fourth, rows, sure, k_tau, spectral_alpha, shift, blocks=summary.blocks)
        frobenius = math.sqrt(spectral * k_tau)
        if invalid == 0:
            frobenius = min(frobenius, frobenius_bound(summary, spectral, sure, k_tau, frobenius_alpha))
        error = missing + error_bound(trace, samples, frobenius, spectral, sure, error_alpha)
        tighter = k_tau + min(k_tau, (norm + error) ** 2)
        if tighter >= sure * INWARD:
            break
        sure = tighter
    shrunk = None
    if deflated is not None and invalid == 0:
        shrunk = min(spectral, spectral_bound(
            deflated.eigenvalue, deflated.fourth, deflated.rows, sure, k_tau, deflated_alpha,
            blocks=deflated.blocks, fewest=deflated.fewest,
        ))  # fmt: skip
    return SecondMoments(sigma, samples, k_tau, norm, trace, error, spectral, frobenius, shrunk)


class TopKCost:
    """cost(s) for all s: the least squared distance to p^ of a map whose top-K lacks s elements of the top-K of p^.

    Holds K = ``k`` and ``costs``, float64 ``[min(K, n-K)]``: a lower bound on cost(1), cost(2), ..., not falling, of
    relative accuracy about 1e-11.
    """

    def __init__(self, mean: Tensor, k: int) -> None:
        """mean: p^, float64 ``[n]``, finite; 1 <= k <= n."""
        if mean.dim() != 1 or mean.dtype != torch.float64:
            raise ValueError(f"mean must be float64 [n], got {mean.dtype} {list(mean.shape)}")
        if not 1 <= k <= len(mean):
            raise ValueError(f"k must be between 1 and n = {len(mean)}, got {k}")
        self.k = k
        descending = np.sort(mean.numpy())[::-1]
        most = min(k, len(descending) - k)
        pivot = descending[k - 1]
        above = descending[k - most : k][::-1] - pivot
        below = pivot - descending[k : k + most]
        sizes = np.arange(1, most + 1)
        self.costs = np.maximum.accumulate(least_costs(above, below, sizes, tolerance=1e-13)) if most else np.empty(0)

    def overlap(self, distance: float) -> int:
        """How many of the top K stay, for every map whose distance from p^ is at most ``distance``."""
        return self.k - int(np.searchsorted(self.costs, distance**2 * (1 + 4 * EPS), side="right"))

    def distance(self, overlap: int) -> float:
        """Every map nearer to p^ than this keeps ``overlap`` of the top K; inf if every map does."""
        leavers = self.k - overlap + 1
        if leavers < 1:
            return 0.0
        return math.inf if leavers > len(self.costs) else math.sqrt(self.costs[leavers - 1]) * INWARD


def _divergence(ratio: float) -> float:
    """sqrt(chi-square divergence) of two unit Gaussians at distance ``ratio``."""
    return math.sqrt(math.expm1(ratio**2)) if ratio < 26 else math.inf


def _cosine(distance: float, norm: float) -> float:
    if not distance < norm:
        return 0.0
    # As a product it keeps its digits where the distance comes near the norm.
    return math.sqrt((norm - distance) * (norm + distance)) / norm * (1 - 4 * EPS)


def _check_radius(radius: float) -> None:
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius must be finite and >= 0, got {radius}")
