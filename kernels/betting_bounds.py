"""Betting bounds of level counts; definition and derivation: robattr_fast/reference/betting_bounds.py.

A program finds the lower bounds of BLOCK rows; a warp's lanes are the shares of one row. Newton's steps and the bound
on rounding are those of the reference, so that a result never lies above the exact root.
"""

import math

import torch
import triton
import triton.language as tl

_BLOCK = 16
# Newton's rule needs about ten; a row that were not done by then would get the asymptote's root, which holds as well.
_MAX_STEPS = 100


@triton.jit
def lower_bounds(
    counts,  # int32 [R, LEVELS + 1]: samples at level 0, 1, ..., LEVELS
    shares,  # float64 [3, SHARES]: b, ln b, ln(1 - b)
    bounds,  # float64 [R]
    target: tl.float64,  # ln(1/delta)
    log_shares: tl.float64,  # ln SHARES
    rows,
    LEVELS: tl.constexpr,
    SHARES: tl.constexpr,
    MAX_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    EPSILON: tl.constexpr = 2.0**-52
    TINY: tl.constexpr = 1e-280  # bounds below are returned as 0
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    at = counts + row.to(tl.int64) * (LEVELS + 1)
    lane = tl.arange(0, SHARES)
    share = tl.load(shares + lane)[None, :]
    log_share = tl.load(shares + SHARES + lane)[None, :]
    log_rest = tl.load(shares + 2 * SHARES + lane)[None, :]
    rest = 1.0 - share
    goal = tl.full((BLOCK,), target, tl.float64)
    log_size = tl.full((BLOCK,), log_shares, tl.float64)

    zeros = tl.load(at, mask=inside, other=0).to(tl.float64)
    above = tl.zeros((BLOCK,), tl.float64)
    log_levels = tl.zeros((BLOCK,), tl.float64)
    first = tl.zeros((BLOCK,), tl.float64)
    second = tl.zeros((BLOCK,), tl.float64)
    for level in range(1, LEVELS + 1):
        value = tl.full((BLOCK,), level, tl.float64) / LEVELS
        count = tl.load(at + level, mask=inside, other=0).to(tl.float64)
        above += count
        log_levels += count * tl.log(value)
        first += count * value
        second += count * value * value
    positive = above > 0
    above = tl.where(positive, above, 1.0)
    total = zeros + above

    # For m -> 0, ln W approaches from above the line with slope -above through this intercept.
    intercept = above[:, None] * log_share + zeros[:, None] * log_rest
    largest = tl.max(intercept, axis=1)
    line = tl.log(tl.sum(tl.exp(intercept - largest[:, None]), axis=1)) + largest - log_size
    start = tl.exp((line + log_levels - goal) / above)
    start = tl.where(start > TINY, start, TINY)
    rounding = EPSILON * (LEVELS + 9) * (5 * total + above * (1.0 - tl.log(start)) - log_levels + goal)
    start = start * tl.exp(-4.0 * rounding / above)
    # The normal approximation is closer to the root for all but the smallest counts.
    mean = first / total
    variance = second / total - mean * mean
    guess = mean - tl.sqrt(2.0 * tl.where(variance > 0, variance, 0.0) * (goal + log_size) / total)
    moving = positive & (start > TINY)
    bound = tl.where(guess > start, guess, start)
    bound = tl.where(moving, bound, 0.0)

    steps = 0
    while (tl.max(moving.to(tl.int32), axis=0) != 0) & (steps < MAX_STEPS):
        odds = share / tl.where(moving, bound, 1.0)[:, None]
        capital = zeros[:, None] * log_rest
        slope = tl.zeros((BLOCK, SHARES), tl.float64) - above[:, None]
        for level in range(1, LEVELS + 1):
            value = tl.full((BLOCK, SHARES), level, tl.float64) / LEVELS
            count = tl.load(at + level, mask=inside, other=0).to(tl.float64)[:, None]
            growth = rest + odds * value
            capital += count * tl.log(growth)
            # d ln(1 - b + b v / m) / d ln m = (1 - b) / growth - 1
            slope += count * (rest / growth)
        largest = tl.max(capital, axis=1)
        weight = tl.exp(capital - largest[:, None])
        sum_of_weights = tl.sum(weight, axis=1)
        excess = tl.log(sum_of_weights) + largest - log_size - goal - 2.0 * rounding
        step = -excess * sum_of_weights / tl.sum(weight * slope, axis=1)
        moving = moving & (tl.abs(excess) > rounding)
        moved = bound * tl.exp(tl.where(moving, step, 0.0))
        bound = tl.where(moving, tl.where(moved > start, moved, start), bound)
        steps += 1
    tl.store(bounds + row, tl.where(moving, start, bound), mask=inside)


def _lower_bounds(counts: torch.Tensor, shares: torch.Tensor, target: float) -> torch.Tensor:
    """int64 [R, L + 1] -> float64 [R]."""
    bounds = counts.new_empty(counts.shape[0], dtype=torch.float64)
    if counts.shape[0] == 0:
        return bounds
    table = torch.stack([shares, shares.log(), torch.log1p(-shares)]).to(counts.device)
    lower_bounds[(triton.cdiv(counts.shape[0], _BLOCK),)](
        counts.to(torch.int32),
        table,
        bounds,
        target,
        math.log(len(shares)),
        counts.shape[0],
        LEVELS=counts.shape[1] - 1,
        SHARES=len(shares),
        MAX_STEPS=_MAX_STEPS,
        BLOCK=_BLOCK,
    )
    return bounds


def betting_bounds(
    lower: torch.Tensor, upper: torch.Tensor, counts: torch.Tensor, shares: torch.Tensor, target: float
) -> None:
    """Fill lower and upper, float64 [R], from counts int64 [R, L + 1], level 0 first; shares float64 [J].

    0/1 samples have few different pairs of counts: bounds are found once per pair, and looked up. target is
    ln(1/delta).
    """
    both = torch.cat([counts, counts.flip(1)])
    if counts.shape[1] == 2 and counts.numel():
        base = both.max() + 1
        pairs, place = (both[:, 0] * base + both[:, 1]).unique(return_inverse=True)
        bounds = _lower_bounds(torch.stack([pairs // base, pairs % base], 1), shares, target)[place]
    else:
        bounds = _lower_bounds(both, shares, target)
    below, mirrored = bounds.view(2, counts.shape[0])
    lower.copy_(below)
    one = torch.ones_like(mirrored)
    upper.copy_(torch.nextafter(one - mirrored, one))
