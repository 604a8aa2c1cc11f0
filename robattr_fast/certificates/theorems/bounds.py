"""One-sided confidence bounds of the mean of every element of a map, from level counts or from sums."""

import math

import torch
from scipy.special import betaincinv

from robattr_fast.ops.betting_bounds import betting_bounds

BOUNDS = ("hoeffding", "kl", "clopper-pearson", "betting")
"""Names of the bounds. `betting` holds at all sample sizes at once, the others for one fixed in advance."""


def check_bound(bound: str, levels: int | None) -> None:
    """Raises ValueError unless `bound` is the name of a bound that exists for maps of this many levels."""
    if bound not in BOUNDS:
        raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}")
    if levels is None and bound not in ("hoeffding", "kl"):
        raise ValueError(f"bound={bound!r} needs level counts; levels=None keeps sums, which take hoeffding or kl")
    if bound == "clopper-pearson" and levels != 1:
        raise ValueError(f"bound='clopper-pearson' takes levels=1 (0/1 maps), got levels={levels}")


def sample_mean(values: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Sample mean of each element, float64 [B, n]; 0 without samples. values, samples: as in `marginal_bounds`.

    Elements whose weighted counts are equal get equal bits: the sum is an exact integer and is divided once.
    """
    q = samples.clamp_min(1)[:, None]
    if values.ndim == 2:
        return values / q
    levels = values.shape[2]
    return values.double() @ torch.arange(1, levels + 1, dtype=torch.float64, device=values.device) / (levels * q)


def _hoeffding(mean: torch.Tensor, samples: int, delta: float) -> tuple[torch.Tensor, torch.Tensor]:
    width = math.sqrt(-math.log(delta) / (2 * samples))
    return (mean - width).clamp_min(0), (mean + width).clamp_max(1)


def _relative_entropy(p: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """kl(p, m) in nats, and a bound of its rounding error."""
    gains = torch.xlogy(p, p), torch.special.xlog1py(1 - p, -p)
    costs = torch.xlogy(p, m), torch.special.xlog1py(1 - p, -m)
    value = (gains[0] - costs[0]) + (gains[1] - costs[1])
    size = gains[0].abs() + gains[1].abs() + costs[0].abs() + costs[1].abs()
    return value, 8 * torch.finfo(torch.float64).eps * size


def _kl_root(mean: torch.Tensor, outer: torch.Tensor, samples: int, delta: float) -> torch.Tensor:
    """The m between `mean` and `outer` with q kl(mean, m) = ln(1/delta), rounded away from the mean; all float64 [N].

    Bisection from the Hoeffding bound `outer`, which the root cannot pass (Pinsker). The outer end of the bracket moves
    only to points where the computed entropy exceeds the target by more than its rounding error.
    """
    target = -math.log(delta) * (1 + torch.finfo(torch.float64).eps)
    inner, middle = mean, (mean + outer) / 2
    while ((middle != inner) & (middle != outer)).any():
        value, error = _relative_entropy(mean, middle)
        beyond = samples * (value - error) >= target
        outer, inner = torch.where(beyond, middle, outer), torch.where(beyond, inner, middle)
        middle = (inner + outer) / 2
    return outer


def _kl(mean: torch.Tensor, samples: int, delta: float) -> tuple[torch.Tensor, torch.Tensor]:
    lower, upper = _hoeffding(mean, samples, delta)
    return _kl_root(mean, lower, samples, delta), _kl_root(mean, upper, samples, delta)


def _clopper_pearson(mean: torch.Tensor, samples: int, delta: float) -> tuple[torch.Tensor, torch.Tensor]:
    hits = (mean * samples).round().numpy()
    lower = betaincinv(hits, samples - hits + 1, delta)
    lower_of_misses = betaincinv(samples - hits, hits + 1, delta)
    # betaincinv(0, .) is NaN: without a hit the lower bound is 0.
    lower, lower_of_misses = (torch.from_numpy(bound).nan_to_num(0.0) for bound in (lower, lower_of_misses))
    return lower, 1 - lower_of_misses


_FIXED_SIZE = {"hoeffding": _hoeffding, "kl": _kl, "clopper-pearson": _clopper_pearson}


def marginal_bounds(
    bound: str, delta: float, values: torch.Tensor, samples: torch.Tensor, *, unknown: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper bound of the mean of each element, each of them one-sided at level `delta`.

    Args:
        bound: one of `BOUNDS`. `kl` (Chernoff: q kl(mean, m) = ln(1/delta)) is never worse than `hoeffding`;
            `clopper-pearson` (Beta quantiles) is exact for 0/1 samples; `betting` holds at all sample sizes at once.
        delta: error probability of one bound, in (0, 1).
        values: int32 [B, n, L], counts of the levels 1..L; or float64 [B, n], sums of values in [0, 1], taken as exact.
        samples: int64 [B], samples per image.
        unknown: int32 [B]; so many samples per image count as 1 in every upper bound. They must be among those that
            counted as 0.

    Returns:
        lower, upper: float64 [B, n] in [0, 1]. An image without samples has [0, 1].

    Raises:
        ValueError: unknown bound, a bound that does not exist for this kind of map, delta outside (0, 1).
    """
    check_bound(bound, values.shape[2] if values.ndim == 3 else None)
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    if unknown is not None and unknown.any():
        lower, _ = marginal_bounds(bound, delta, values, samples)
        raised = values.clone()
        (raised if values.ndim == 2 else raised[:, :, -1]).add_(unknown[:, None])
        return lower, marginal_bounds(bound, delta, raised, samples)[1]
    if bound == "betting":
        return betting_bounds(values, samples, delta)

    mean = sample_mean(values, samples)
    lower, upper = torch.zeros_like(mean), torch.ones_like(mean)
    for q in samples[samples > 0].unique().tolist():
        # The bounds depend on the mean alone, and 0/1 maps have at most q + 1 different ones.
        images = samples == q
        table, index = mean[images].unique(return_inverse=True)
        lower[images], upper[images] = (ends[index] for ends in _FIXED_SIZE[bound](table, q, delta))
    return lower, upper
