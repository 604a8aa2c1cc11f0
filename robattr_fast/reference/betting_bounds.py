"""Anytime-valid confidence bounds for the mean of [0, 1]-valued samples, from their level counts alone.

Bet a share b of the capital against "the mean is at most m" before each sample h: the capital is multiplied by
``(1 - b) + b h / m``. If the mean really is at most m this is a nonnegative supermartingale that starts at 1, and so is
the average over a fixed grid of shares. By Ville's inequality it ever reaches 1/delta with probability at most delta:

    W(m) = 1/J sum_j prod_l ((1 - b_j) + b_j v_l / m)^{c_l},     v_l = l / L,

falls in m, and the m with W(m) = 1/delta is a lower bound that holds at all sample sizes at once.
The upper bound is one minus the lower bound of 1 - h.

Sources: Ville, Etude critique de la notion de collectif, 1939; Waudby-Smith and Ramdas, Estimating means of bounded
random variables by betting, JRSS B 2024 (the capital process; here its shares are a fixed mixture, so that the
capital depends on the counts alone).
"""

import math
import numbers

import torch

NUM_SHARES = 32
"""Size J of the grid of shares."""

SMALLEST_SHARE, LARGEST_SHARE = 1e-4, 0.99
"""Ends of the grid, which is even in log(b / (1 - b)): geometric with ratio 1.56 for small b, and in 1 - b near 1.

The best share is (p - m)/(1 - m), p the sample mean and m the bound. Measured in nats: how much larger than ln(1/delta)
the relative entropy q kl(p, m) at the bound is, for p from 1e-4 to 1, q from 64 to 65536 and delta from 2e-3 to 7e-8.
The grid costs 2.8 on average and 3.7 at most, of which up to ln J = 3.47 pays for not knowing the best share.
(24 points: 4.0 at most; 48: 3.5. Without shares below 1e-3 the bound of p = 1e-4 at q = 65536 would cost 46.)
"""

_CHUNK = 1 << 19
"""Elements of one [rows, J, L] working array: 4 MB."""

_MAX_SAMPLES = 2**31 - 1
"""What a count can hold; beyond, pairs of counts would not fit the int64 keys below either."""

_TINY = 1e-280
"""Bounds below this are returned as 0: their reciprocal would come near the end of float64."""


def betting_shares(device: torch.device) -> torch.Tensor:
    """The grid of shares b_j, float64 [J], rising; computed on the CPU. It is part of the definition of the bound."""
    low, high = (math.log(b / (1 - b)) for b in (SMALLEST_SHARE, LARGEST_SHARE))
    return torch.sigmoid(torch.linspace(low, high, NUM_SHARES, dtype=torch.float64, device="cpu")).to(device)


def check_arguments(counts: torch.Tensor, samples: torch.Tensor | int, delta: float) -> torch.Tensor:
    """Raises unless shapes, dtypes and delta are what `betting_bounds` takes; samples as int64 [B] beside counts."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie in (0, 1), got {delta}")
    if not isinstance(counts, torch.Tensor) or counts.dtype != torch.int32:
        raise TypeError(f"counts must be an int32 tensor, got {getattr(counts, 'dtype', type(counts).__name__)}")
    if counts.ndim != 3 or counts.shape[0] < 1 or counts.shape[2] < 1:
        raise ValueError(f"counts must have shape [B, n, L] with B, L >= 1, got {list(counts.shape)}")
    if isinstance(samples, torch.Tensor):
        if samples.dtype != torch.int64:
            raise TypeError(f"samples must be int64, got {samples.dtype}")
        if samples.shape != counts.shape[:1]:
            raise ValueError(f"samples must have shape [{counts.shape[0]}] as counts says, got {list(samples.shape)}")
        return samples.to(counts.device)
    if isinstance(samples, numbers.Integral) and not isinstance(samples, bool):
        return torch.full((counts.shape[0],), int(samples), dtype=torch.int64, device=counts.device)
    raise TypeError(f"samples must be an int or an int64 tensor, got {type(samples).__name__}")


def counts_at_zero(counts: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """How many samples had the value 0, int64 [B, n]; ValueError for numbers that no samples give."""
    if counts.numel() and counts.min() < 0:
        raise ValueError(f"counts must not be negative, got {int(counts.min())}")
    if (samples > _MAX_SAMPLES).any():
        raise ValueError(f"samples must be at most {_MAX_SAMPLES}, got {int(samples.max())}")
    rest = samples[:, None] - counts.sum(2, dtype=torch.int64)
    if (samples < 0).any() or (rest < 0).any():
        raise ValueError("the counts of an element must not add up to more than samples")
    return rest


def _rows(counts: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Counts of the levels 0..L of all elements, int64 [B n, L + 1]."""
    return torch.cat([counts_at_zero(counts, samples)[:, :, None], counts.long()], 2).flatten(0, 1)


def _log_wealth(counts: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ln W at `mean` and its derivative with respect to ln(mean).

    counts: float64 [R, L + 1], level 0 first; mean: float64 [R], above 0. Both results are float64 [R].
    """
    shares = betting_shares(counts.device)
    levels = torch.arange(1, counts.shape[1], dtype=torch.float64, device=counts.device) / (counts.shape[1] - 1)
    stakes = shares[:, None] * levels
    growth = (1 - shares)[:, None] + stakes / mean[:, None, None]  # [R, J, L]
    moved = counts[:, 1:, None]
    capital = (growth.log() @ moved)[:, :, 0] + counts[:, :1] * torch.log1p(-shares)
    # d ln(1 - b + b v / m) / d ln m = (1 - b) / growth - 1
    slope = (1 - shares) * (growth.reciprocal_() @ moved)[:, :, 0] - counts[:, 1:].sum(1, keepdim=True)
    log_wealth = capital.logsumexp(1) - math.log(NUM_SHARES)
    return log_wealth, (capital.softmax(1) * slope).sum(1)


def _lower(counts: torch.Tensor, delta: float) -> torch.Tensor:
    """The lower bound of every row. counts: float64 [R, L + 1] with at least one sample above level 0 in each row.

    ln W is convex and falls in ln m, so a Newton step from anywhere ends at or below the root, and from there on the
    iterates rise towards it. `rounding` bounds the floating-point error of ln W; the result is accepted only if its
    computed ln W exceeds ln(1/delta) by at least that much, so it never lies above the exact root.
    """
    target = -math.log(delta)
    total, above = counts.sum(1), counts[:, 1:].sum(1)
    shares = betting_shares(counts.device)
    levels = torch.arange(1, counts.shape[1], dtype=torch.float64, device=counts.device) / (counts.shape[1] - 1)

    # For m -> 0, ln W approaches from above the line with slope -above through this intercept.
    log_levels = counts[:, 1:] @ levels.log()
    line = (above[:, None] * shares.log() + counts[:, :1] * torch.log1p(-shares)).logsumexp(1) - math.log(NUM_SHARES)
    start = ((line + log_levels - target) / above).exp().clamp_min(_TINY)
    rounding = (
        torch.finfo(torch.float64).eps
        * (counts.shape[1] + 8)
        * (5 * total + above * (1 - start.log()) - log_levels + target)
    )
    # Below the aim of the iteration, not only below the target.
    start = start * (-4 * rounding / above).exp()
    # The normal approximation is closer to the root for all but the smallest counts.
    mean = counts[:, 1:] @ levels / total
    variance = counts[:, 1:] @ levels.square() / total - mean.square()
    guess = mean - (2 * variance.clamp_min(0) * (target + math.log(NUM_SHARES)) / total).sqrt()
    bound = torch.where(start > _TINY, torch.maximum(start, guess), 0.0)
    pending = bound.nonzero()[:, 0]
    while len(pending):
        log_wealth, slope = _log_wealth(counts[pending], bound[pending])
        excess = log_wealth - target - 2 * rounding[pending]
        moving = excess.abs() > rounding[pending]
        pending = pending[moving]
        step = (-excess[moving] / slope[moving]).exp()
        bound[pending] = torch.maximum(bound[pending] * step, start[pending])
    return bound


def _lower_of_rows(counts: torch.Tensor, delta: float) -> torch.Tensor:
    """counts: int64 [R, L + 1] -> float64 [R]; rows without any sample above level 0 have the bound 0."""
    if counts.shape[1] == 2:
        # 0/1 samples: few pairs (c_0, c_1) are different.
        base = counts.max() + 1 if len(counts) else 1
        table, inverse = (counts[:, 0] * base + counts[:, 1]).unique(return_inverse=True)
        rows = torch.stack([table // base, table % base], 1)
    else:
        rows, inverse = counts, slice(None)
    bounds = torch.zeros(len(rows), dtype=torch.float64, device=counts.device)
    nonzero = rows[:, 1:].any(1).nonzero()[:, 0]
    for chunk in nonzero.split(max(1, _CHUNK // (NUM_SHARES * counts.shape[1]))):
        bounds[chunk] = _lower(rows[chunk].double(), delta)
    return bounds[inverse]


def betting_bounds(
    counts: torch.Tensor, samples: torch.Tensor | int, delta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-sided lower and upper confidence bounds of the mean of each element, each at level `delta`.

    Args:
        counts: int32 [B, n, L]; ``counts[..., l - 1]`` samples of the element had the value l/L, all others 0.
        samples: number of samples q of each image, int64 [B] or one int for all, at most 2^31 - 1.
        delta: error probability of each of the two bounds, in (0, 1).

    Returns:
        lower, upper: float64 [B, n], with 0 <= lower <= upper <= 1. Each holds with probability 1 - delta at all
        sample sizes at once: counts may be looked at after every batch. Both are rounded outwards. No samples give
        [0, 1].

    Raises:
        TypeError: counts are not int32, or samples not int64.
        ValueError: delta outside (0, 1), wrong shapes, too many samples, negative counts, or more counts than samples.
    """
    rows = _rows(counts, check_arguments(counts, samples, delta))
    lower, mirrored = (_lower_of_rows(side, delta).view(counts.shape[:2]) for side in (rows, rows.flip(1)))
    one = torch.ones_like(mirrored)
    return lower, torch.nextafter(one - mirrored, one)


def log_wealth(counts: torch.Tensor, samples: torch.Tensor | int, mean: torch.Tensor) -> torch.Tensor:
    """ln W(mean): the log of the evidence against "the mean of the element is at most `mean`".

    counts, samples: as in `betting_bounds`. mean: float64 [B, n] in (0, 1]. Returns float64 [B, n].
    The expectation of exp(ln W) is at most 1 at any stopping time if the statement is true.
    """
    rows = _rows(counts, check_arguments(counts, samples, 0.5)).double()
    if mean.shape != counts.shape[:2] or mean.dtype != torch.float64:
        raise ValueError(f"mean must be float64 {list(counts.shape[:2])}, got {mean.dtype} {list(mean.shape)}")
    if not ((mean > 0) & (mean <= 1)).all():
        raise ValueError("mean must lie in (0, 1]")
    chunk = max(1, _CHUNK // (NUM_SHARES * rows.shape[1]))
    parts = [_log_wealth(*part)[0] for part in zip(rows.split(chunk), mean.flatten().split(chunk), strict=True)]
    return torch.cat(parts).view_as(mean)
