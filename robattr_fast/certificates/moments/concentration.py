"""What counts and a Gram matrix prove about the covariance of a sparsified map (theorem T7; docs/second-moments.md).

Symbols: h_1..h_q are independent samples of a map in [0,1]^n with at most ``k_tau`` nonzero elements, p their mean,
Sigma their covariance, lambda its largest eigenvalue, F its Frobenius norm, B^2 a sure bound on ||h - p||^2.
Every bound returned is rounded outward.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from robattr_fast.certificates.moments.eigenvalues import (
    centred_gram,
    largest_eigenvalue,
    largest_eigenvalue_of_squares_,
    rounding_of,
)
from robattr_fast.certificates.moments.rounding import OUTWARD, UP
from robattr_fast.certificates.moments.scatter import Scatter
from robattr_fast.certificates.theorems.bounds import sample_mean

FIRST_LOOK = 512
#: How alpha is split between the four events of T7, before sampling.
ERROR_SHARE, SPECTRAL_SHARE, DEFLATED_SHARE, FROBENIUS_SHARE = 0.4, 0.2, 0.25, 0.15
#: The share of each event that the planned last look keeps; the earlier looks divide the rest equally.
LAST_LOOK_SHARE = 0.75
# The bet of lemma 4, as a share of the largest possible one. Between .8 and .9 lambda_u changes by 2 % at most.
_BET = 0.85
# Of the search for a root, which takes 5, and 20 where the two sides of an inequality all but touch.
_GRIDS = 200


def look_schedule(planned: int) -> dict[int, float]:
    """The looks of a run of ``planned`` samples with the share of an event's alpha that each consumes.

    512 * 2^j below ``planned``, and ``planned`` itself: it has 3/4, the others share 1/4 equally; alone it has all.
    A look that is skipped consumes its share all the same.
    """
    if planned < 2:
        raise ValueError(f"planned must be at least 2 samples, got {planned}")
    early = []
    look = FIRST_LOOK
    while look < planned:
        early.append(look)
        look *= 2
    if not early:
        return {planned: 1.0}
    return dict.fromkeys(early, (1 - LAST_LOOK_SHARE) / len(early)) | {planned: LAST_LOOK_SHARE}


def block_rows(planned: int, retain: int) -> int:
    """Rows of each block of retained samples: equal blocks of at most ``retain``, as few as can use up the plan.

    ValueError if nothing is planned.
    """
    if planned < 1:
        raise ValueError(f"planned samples must be at least 1, got {planned}")
    return planned // -(-planned // retain)


def rows_in_blocks(samples: int, planned: int, retain: int) -> int:
    """How many of the first ``samples`` the Gram matrices hold: whole blocks, or all samples of the first one."""
    block = block_rows(planned, retain)
    return samples if samples < block else min(samples // block, planned // block) * block


def mean_map(counts: Tensor, samples: int) -> Tensor:
    """p^ of one image, float64 ``[n]``: `sample_mean` of counts int ``[n, L]`` in ``samples`` samples."""
    return sample_mean(counts[None], torch.tensor([samples]))[0]


def trace_estimate(counts: Tensor, samples: int) -> float:
    """The unbiased estimate of trace(Sigma) that counts alone give: sum_t ||h_t - p^||^2 / (q-1).

    counts: int ``[n, L]``, how often each of the levels 1..L was met in ``samples`` samples. Exact integers up to the
    last division.
    """
    if counts.dim() != 2 or counts.shape[1] < 1:
        raise ValueError(f"counts must have shape [n, L], got {list(counts.shape)}")
    if not 2 <= samples < 2**31:
        raise ValueError(f"samples must be between 2 and 2^31 - 1, got {samples}")
    num_levels = counts.shape[1]
    levels = torch.arange(1, num_levels + 1, dtype=torch.int64)
    wide = counts.to(torch.int64)
    first = (wide * levels).sum(1)
    second = int((wide * levels**2).sum())
    # first <= 15 * 2^31 < 2^35: squared in two limbs, so that no sum passes 2^63.
    high, low = first >> 18, first & (2**18 - 1)
    squares = (int((high * high).sum()) << 36) + (int((high * low).sum()) << 19) + int((low * low).sum())
    return (samples * second - squares) / (num_levels**2 * samples * (samples - 1))


@dataclass(frozen=True)
class GramSummary:
    """All that the ball of T7 needs from the retained samples, eight numbers per look. h is in units of 1, not levels.

    rows: m, the samples in all ``blocks`` of equal size. The others are means over the blocks, or where it says so the
    largest. norm2 (largest): ||mean||^2 of a block. eigenvalue: the largest of the centred Gram matrix over its size,
    that is of the empirical covariance. fourth: the same of its squared entries, at least the fourth moment of the
    centred samples along any direction. For the first half of a block, rounded down, of mean a and empirical covariance
    Sigma_A: half_eigenvalue (largest): the largest eigenvalue of Sigma_A; half_norm2 (largest): ||a||^2; half_mean:
    mean over the other samples of (h - a)' Sigma_A (h - a). All rounded up.
    """

    rows: int
    blocks: int
    norm2: float
    eigenvalue: float
    fourth: float
    half_eigenvalue: float
    half_norm2: float
    half_mean: float

    @property
    def block_rows(self) -> int:
        """Rows of one block."""
        return self.rows // self.blocks

    def joined(self, other: "GramSummary") -> "GramSummary":
        """The summary of the blocks of both, which are of one size."""
        if self.block_rows != other.block_rows:
            raise ValueError(f"blocks must be of one size, got {self.block_rows} and {other.block_rows}")
        blocks = self.blocks + other.blocks

        def mean(name: str) -> float:
            return (self.blocks * getattr(self, name) + other.blocks * getattr(other, name)) / blocks * UP

        return GramSummary(
            rows=self.rows + other.rows,
            blocks=blocks,
            norm2=max(self.norm2, other.norm2),
            eigenvalue=mean("eigenvalue"),
            fourth=mean("fourth"),
            half_eigenvalue=max(self.half_eigenvalue, other.half_eigenvalue),
            half_norm2=max(self.half_norm2, other.half_norm2),
            half_mean=mean("half_mean"),
        )

    def to_array(self) -> np.ndarray:
        """float64 ``[8]``, in the order of the fields."""
        return np.array([getattr(self, field.name) for field in fields(self)], dtype=np.float64)

    @classmethod
    def from_array(cls, values: np.ndarray) -> "GramSummary":
        """The inverse of :meth:`to_array`; ValueError for values that no Gram matrix gives."""
        numbers = np.asarray(values, dtype=np.float64)
        if numbers.shape != (8,) or not np.isfinite(numbers).all() or (numbers < 0).any() or (numbers[:2] % 1).any():
            raise ValueError(f"values must be eight finite numbers >= 0, the first two integers, got {numbers}")
        rows, blocks = int(numbers[0]), int(numbers[1])
        if blocks < 1 or rows % blocks:
            raise ValueError(f"rows must be divided among blocks of one size, got {rows} rows, {blocks} blocks")
        return cls(rows, blocks, *(float(number) for number in numbers[2:]))


def summarize_gram(gram: Tensor, num_levels: int, halves: tuple[Scatter, Scatter] | None = None) -> GramSummary:
    """The numbers of T7 from the Gram matrix int64 ``[m, m]``, m >= 4, of the levels of m samples: one block.

    halves: of the first m//2 samples and of the others, where that costs less (`Scatter`).
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] < 4:
        raise ValueError(f"gram must have shape [m, m] with m >= 4, got {list(gram.shape)}")
    if gram.dtype != torch.int64:
        raise TypeError(f"gram must be int64, got {gram.dtype}")
    rows = gram.shape[0]
    half = rows // 2
    entry_error = rounding_of(gram, num_levels)
    if halves is None:
        about_half, half_norm2 = _about_half(gram, num_levels)
        half_eigenvalue = largest_eigenvalue(about_half[:half]) / half + entry_error
        half_mean = float(about_half[half:].abs_().add_(entry_error).square_().mean(1).mean())
        del about_half
        centred = centred_gram(gram, num_levels)
        eigenvalue = largest_eigenvalue(centred) / rows + entry_error
        norm2 = int(gram.sum()) / (rows * num_levels) ** 2
    else:
        first, second = halves
        half_eigenvalue, half_norm2, half_mean = first.eigenvalue, first.norm2, first.mean_form(second)
        scatter = first.joined(second)
        eigenvalue, norm2 = scatter.eigenvalue, scatter.norm2
        centred = centred_gram(gram, num_levels)
    return GramSummary(
        rows=rows,
        blocks=1,
        norm2=norm2 * (1 + OUTWARD),
        eigenvalue=eigenvalue,
        fourth=largest_eigenvalue_of_squares_(centred, entry_error) / rows,
        half_eigenvalue=half_eigenvalue,
        half_norm2=half_norm2 * (1 + OUTWARD),
        half_mean=half_mean * (1 + OUTWARD),
    )


def _about_half(gram: Tensor, num_levels: int) -> tuple[Tensor, float]:
    """Inner products float64 ``[m, m//2]`` of all samples with the first half, less its mean a, and ||a||^2."""
    half = len(gram) // 2
    sums = gram[:, :half].sum(1)
    to_half = sums.to(torch.float64).div_(half * num_levels**2)
    norm2 = int(sums[:half].sum()) / (half * num_levels) ** 2
    inner = gram[:, :half].to(torch.float64).div_(num_levels**2)
    return inner.sub_(to_half[:, None]).sub_(to_half[None, :half]).add_(norm2), norm2


def bernoulli_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Relative entropy of Bernoulli(p) to Bernoulli(q), elementwise, 0 <= p <= 1, 0 < q < 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ones = np.where(p > 0, p * np.log(p / q), 0.0)
        zeros = np.where(p < 1, (1 - p) * (np.log1p(-p) - np.log1p(-q)), 0.0)
    return ones + zeros


def largest_root(excluded: Callable[[np.ndarray, np.ndarray], np.ndarray], low: float, high: float) -> float:
    """An upper bound, tight to 1e-8 at most roots, on every x in [0, high] that is not excluded.

    excluded(a, b) -> bool: True only if no x of the cell [a, b] is admissible. Cells are searched from the top on
    finer and finer grids, so a gap below the largest admissible x does not mislead, nor a coarse cell that only its
    width keeps from being excluded. ``low`` > 0: below it no search.
    """
    if not high > low > 0:
        return high
    grids = 0

    def search(low: float, high: float) -> float | None:
        nonlocal grids
        grids += 1
        edges = np.geomspace(low, high, 129)
        edges[0], edges[-1] = low, high
        for cell in np.flatnonzero(~excluded(edges[:-1], edges[1:]))[::-1]:
            start, end = float(edges[cell]), float(edges[cell + 1])
            found = end if end <= start * (1 + OUTWARD) or grids >= _GRIDS else search(start, end)
            if found is not None:
                return found
        return None

    found = search(low, high)
    return (low if found is None else found) * (1 + OUTWARD)


def mean_bound(
    observed: Callable[[np.ndarray], np.ndarray], ceiling: float, samples: int, log_inverse: float, high: float
) -> float:
    """Upper confidence bound x <= ``high`` on the mean of independent samples in [0, ceiling], rounded outward.

    The largest x with samples * kl(observed(x)/ceiling, x/ceiling) <= log_inverse, or with observed(x) >= x. The
    average of the samples is known only to be at most ``observed(x)``, which must not fall in x.
    """

    def excluded(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        # On [a, b] the average is at most observed(b) and the mean at least a.
        average, mean = observed(b) / ceiling, a / ceiling
        candidate = (average < mean) & (mean < 1)
        result = np.zeros(a.shape, dtype=bool)
        result[candidate] = samples * bernoulli_kl(average[candidate], mean[candidate]) > log_inverse
        return result

    if not ceiling > 0:
        return 0.0
    return largest_root(excluded, high * 1e-12, high)


def spectral_bound(
    eigenvalue: float,
    fourth: float,
    rows: int,
    sure: float,
    k_tau: int,
    delta: float,
    shift: float = 0.0,
    *,
    blocks: int = 1,
    fewest: int | None = None,
) -> float:
    """lambda_u >= lambda with probability >= 1 - delta (lemma 4).

    eigenvalue, fourth: means over the ``rows`` samples in ``blocks``, each centred at the mean of its block, as in
    :class:`GramSummary`. fewest: rows of the smallest block; default rows/blocks. sure: B^2. shift: how far, along any
    direction, the centre of a block may lie from the mean of its samples (invalid samples). Nine tenths of delta pay
    for the variance along the fixed, unknown, top direction, one tenth for centring it.
    """
    fewest = rows // blocks if fewest is None else fewest
    log_inverse = math.log(1 / (0.9 * delta))
    log_centre = math.log(2 * blocks / (0.1 * delta))
    remainder = (-math.log1p(-_BET) - _BET) * sure / k_tau

    def excluded(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        centre = np.sqrt(2 * b * log_centre / fewest) + math.sqrt(sure) * log_centre / (3 * fewest)
        second = eigenvalue + centre**2
        fourth_root = fourth**0.25 + centre + shift
        allowed = log_inverse / rows + (_BET * second + remainder * fourth_root**4 / sure) / sure
        return -np.log1p(-_BET * a / sure) > allowed

    high = min(sure, k_tau)
    return largest_root(excluded, high * 1e-12, high)


def frobenius_bound(summary: GramSummary, spectral: float, sure: float, k_tau: int, delta: float) -> float:
    """F_u >= F with probability >= 1 - delta, where ``spectral`` >= lambda and ``sure`` = B^2 (lemma 5)."""
    half = summary.block_rows // 2
    first = summary.blocks * half
    second = summary.rows - first
    log_inverse = math.log(1 / (0.4 * delta))
    sure_half = summary.half_eigenvalue * (k_tau + summary.half_norm2)
    crossed = mean_bound(
        lambda x: np.full_like(x, summary.half_mean), sure_half, second, log_inverse, sure_half
    )  # >= trace(Sigma Sigma_A)

    def observed(x: np.ndarray) -> np.ndarray:
        centre = spectral * sure * x / half**3 + (x**2 + 2 * spectral**2 * x) / half**2
        return crossed + np.sqrt(centre / (0.2 * delta))

    return math.sqrt(mean_bound(observed, spectral * sure, first, log_inverse, spectral * min(sure, k_tau)))


def error_bound(trace: float, samples: int, frobenius: float, spectral: float, sure: float, delta: float) -> float:
    """e_q >= ||p^ - p|| with probability >= 1 - delta (lemma 3), for one q = ``samples`` fixed in advance.

    trace: :func:`trace_estimate` of the same samples. The smaller of Cantelli's bound, from the variance of
    N = sum over s != t of D_s . D_t, and Markov's, from its fourth moment.
    """
    q = samples
    variance = 2.0 * q * (q - 1) * frobenius**2
    spectral = min(spectral, frobenius)
    pairs = q * (q - 1) / 2
    fourth = 16 * (
        3 * pairs * (q - 2) * (q - 3) / 2 * frobenius**4
        + 3.0 * q * (q - 1) * (q - 2) * (q - 3) * (spectral * frobenius) ** 2
        + 9.0 * q * (q - 1) * (q - 2) * spectral * sure * frobenius**2
        + pairs * (sure * frobenius) ** 2
    )
    deviation = min(math.sqrt(variance * (1 / delta - 1)), (fourth / delta) ** 0.25)
    return math.sqrt(max(trace / q + deviation / (q * (q - 1)), 0.0)) * (1 + OUTWARD)
