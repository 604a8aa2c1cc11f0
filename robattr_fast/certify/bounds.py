"""One-sided confidence bounds of the mean of every element of a map, from level counts or from sums."""

import math

import torch
from scipy.special import betaincinv

from robattr_fast.reference.betting_bounds import betting_bounds

BOUNDS = ("hoeffding", "kl", "clopper-pearson", "betting")
"""Names of the bounds. `betting` holds at all sample sizes at once, the others for one fixed in advance."""

FIXED_SIZE_BOUNDS = frozenset(BOUNDS) - {"betting"}


def check_bound(bound: str, levels: int | None) -> None:
    """Raises ValueError unless `bound` is the name of a bound that exists for maps of this many levels."""
    if bound not in BOUNDS:
        raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}")
    if levels is None and bound not in ("hoeffding", "kl"):
        raise ValueError(f"bound={bound!r} needs level counts; levels=None keeps sums, which take hoeffding or kl")
    if bound == "clopper-pearson" and levels != 1:
        raise ValueError(f"bound='clopper-pearson' takes levels=1 (0/1 maps), got levels={levels}")


def mean_of_counts(counts: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Sample mean of each element, float64 [B, n]; 0 without samples. counts: int32 [B, n, L], samples: int64 [B].

    Equal weighted counts give equal bits: the sum is an integer and is divided once.
    """
    levels = counts.shape[2]
    weights = torch.arange(1, levels + 1, dtype=torch.int64, device=counts.device)
    # The widest sum is q L < 2^53; accumulated level by level to keep temporaries at [B, n].
    total = sum(counts[:, :, level].long() * weights[level] for level in range(levels))
    return mean_of_sums(torch.as_tensor(total, dtype=torch.float64) / levels, samples)


def mean_of_sums(sums: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """sums / samples, float64 [B, n]; 0 without samples."""
    return sums / samples.clamp_min(1)[:, None]


def _hoeffding(mean: torch.Tensor, samples: torch.Tensor, delta: float) -> tuple[torch.Tensor, torch.Tensor]:
    width = (-math.log(delta) / (2 * samples.double())).sqrt()[:, None]
    return (mean - width).clamp(0, 1), (mean + width).clamp(0, 1)


def _relative_entropy(p: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """kl(p, m) in nats for 0 < m < 1, and a bound of its rounding error."""
    gains = torch.xlogy(p, p), torch.xlogy(1 - p, 1 - p)
    costs = p * m.log(), (1 - p) * torch.log1p(-m)
    value = (gains[0] - costs[0]) + (gains[1] - costs[1])
    size = gains[0].abs() + gains[1].abs() + costs[0].abs() + costs[1].abs()
    return value, 8 * torch.finfo(torch.float64).eps * size


def _kl_upper(mean: torch.Tensor, samples: torch.Tensor, delta: float) -> torch.Tensor:
    """The largest m with q kl(mean, m) <= ln(1/delta), rounded upwards. mean: float64 [N], samples: float64 [N].

    Bisection between the mean and the Hoeffding bound, above which the root cannot lie (Pinsker). The upper end of the
    bracket moves only to points where the computed entropy exceeds the target by more than its rounding error.
    """
    target = -math.log(delta)
    low, high = mean.clone(), (mean + (target / (2 * samples)).sqrt()).clamp(max=1)
    for _ in range(64):
        middle = (low + high) / 2
        inside = (middle > low) & (middle < high)
        if not inside.any():
            break
        value, error = _relative_entropy(mean, torch.where(inside, middle, 0.5))
        beyond = samples * (value - error) >= target * (1 + torch.finfo(torch.float64).eps)
        high = torch.where(inside & beyond, middle, high)
        low = torch.where(inside & ~beyond, middle, low)
    return high


def _by_table(mean: torch.Tensor, samples: torch.Tensor, upper) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of each image by evaluating `upper(distinct means, samples) -> tensor` at the distinct means only."""
    lower, higher = torch.empty_like(mean), torch.empty_like(mean)
    for image, q in enumerate(samples.tolist()):
        table, index = mean[image].unique(return_inverse=True)
        size = torch.full_like(table, q)
        higher[image] = upper(table, size)[index]
        lower[image] = (1 - upper(1 - table, size)).clamp_min(0)[index]
    return lower, higher


def _clopper_pearson_upper(mean: torch.Tensor, samples: torch.Tensor, delta: float) -> torch.Tensor:
    count = (mean * samples).round()
    # One minus the lower quantile of the complement: exact 1 at count = q.
    return 1 - torch.from_numpy(betaincinv((samples - count).numpy(), (count + 1).numpy(), delta)).nan_to_num(0.0)


def marginal_bounds(
    bound: str,
    delta: float,
    samples: torch.Tensor,
    *,
    counts: torch.Tensor | None = None,
    sums: torch.Tensor | None = None,
    unknown: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bound of the mean of each element, each of them one-sided at level `delta`.

    Args:
        bound: one of `BOUNDS`. `kl` (Chernoff: q kl(mean, m) = ln(1/delta)) is never worse than `hoeffding`;
            `clopper-pearson` (Beta quantiles) is exact for 0/1 samples; `betting` holds at all sample sizes at once.
        delta: error probability of one bound, in (0, 1).
        samples: int64 [B], samples per image.
        counts: int32 [B, n, L], counts of the levels 1..L; or
        sums: float64 [B, n], sums of values in [0, 1]; taken as exact.
        unknown: int32 [B]; so many samples per image count as 1 in every upper bound. They must be among those that
            counted as 0.

    Returns:
        lower, upper: float64 [B, n] in [0, 1] on the CPU. An image without samples has [0, 1].

    Raises:
        ValueError: unknown bound, a bound that does not exist for this kind of map, delta outside (0, 1).
    """
    if (counts is None) == (sums is None):
        raise ValueError("give exactly one of counts and sums")
    check_bound(bound, None if counts is None else counts.shape[2])
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    if unknown is not None and unknown.any():
        lower, _ = marginal_bounds(bound, delta, samples, counts=counts, sums=sums)
        if counts is not None:
            counts = counts.clone()
            counts[:, :, -1] += unknown[:, None]
        else:
            sums = sums + unknown[:, None]
        return lower, marginal_bounds(bound, delta, samples, counts=counts, sums=sums)[1]

    if bound == "betting":
        return betting_bounds(counts, samples, delta)
    mean = mean_of_counts(counts, samples) if counts is not None else mean_of_sums(sums, samples)
    if bound == "hoeffding":
        lower, upper = _hoeffding(mean, samples, delta)
    elif bound == "kl":
        lower, upper = _by_table(mean, samples, lambda mean, q: _kl_upper(mean, q, delta))
    else:
        lower, upper = _by_table(mean, samples, lambda mean, q: _clopper_pearson_upper(mean, q, delta))
    empty = (samples == 0)[:, None]
    return lower.masked_fill(empty, 0.0), upper.masked_fill(empty, 1.0)
