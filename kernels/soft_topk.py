"""The soft top-k of each row; definition: robattr_fast/reference/soft_topk.py.

One program finds the offset of one row by Newton's method, kept inside of a bracket, in as many passes over the row as
that needs. With x_i = (s_i - pivot) / T - offset and q = sigmoid(-|x|) the sum of h exceeds k by
    (below + max(count - k, 0)) - (above + max(k - count, 0)),
count the number of x >= 0, above and below the sums of q over these and over the others: nothing cancels. The
logarithms of the two sides are nearly straight lines in the offset, both where T is large and where it is small.
"""

import math

import torch
import triton
import triton.language as tl

from robattr_fast.kernels._select import as_rows, kth_largest

_BLOCK = 1024


@triton.jit
def _smaller_share(s, shrink, pivot, factor0, factor1, y):
    """x, and q = sigmoid(-|x|); 0 where s is -inf."""
    x = (s * shrink - pivot * shrink) * factor0 * factor1 - y
    e = tl.exp(-tl.abs(x))
    return x, e / (e + 1)


@triton.jit(do_not_specialize=["n", "k"])
def soft_topk_rows(
    scores,  # [R, n], rows row_stride apart
    row_stride,
    out,  # [R, n]
    pivots,  # [R]: the k-th largest; NaN is written for a row with NaN or inf
    offsets,  # [R], written: nu = pivot + T offset
    shrink: tl.float64,  # these three multiply to 1 / T
    factor0: tl.float64,
    factor1: tl.float64,
    lowest: tl.float64,  # bracket of the offset
    highest: tl.float64,
    settled: tl.float64,  # a Newton step that leaves nothing but rounding
    resolution: tl.float64,  # a bracket that does
    n,
    k,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pivot = tl.load(pivots + row)
    FLOAT: tl.constexpr = pivot.dtype
    scores += row * row_stride
    out += row * n

    bad = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        s = tl.load(scores + i, mask=i < n, other=0.0).to(FLOAT)
        bad += (~(tl.abs(s) < float("inf"))).to(tl.int32)
    valid = tl.sum(bad, axis=0) == 0

    # Numbers become tensors: a variable of a loop may not change its type.
    shrink = tl.full((), shrink, FLOAT)
    factor0 = tl.full((), factor0, FLOAT)
    factor1 = tl.full((), factor1, FLOAT)
    low = tl.full((), lowest, tl.float64)
    high = tl.full((), highest, tl.float64)
    y = tl.full((), 0.0, tl.float64)
    last_step = high - low
    unsettled = valid
    while unsettled:
        above = tl.zeros((BLOCK,), FLOAT)
        below = tl.zeros((BLOCK,), FLOAT)
        above_slope = tl.zeros((BLOCK,), FLOAT)
        below_slope = tl.zeros((BLOCK,), FLOAT)
        counts = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, n, BLOCK):
            i = first + tl.arange(0, BLOCK)
            s = tl.load(scores + i, mask=i < n, other=-float("inf")).to(FLOAT)
            x, q = _smaller_share(s, shrink, pivot, factor0, factor1, y.to(FLOAT))
            up = x >= 0
            above += tl.where(up, q, 0.0)
            below += tl.where(up, 0.0, q)
            above_slope += tl.where(up, q * (1 - q), 0.0)
            below_slope += tl.where(up, 0.0, q * (1 - q))
            counts += up.to(tl.int32)
        count = tl.sum(counts, axis=0)
        many = tl.sum(below.to(tl.float64), axis=0) + tl.maximum(count - k, 0)
        few = tl.sum(above.to(tl.float64), axis=0) + tl.maximum(k - count, 0)
        low = tl.where(many >= few, y, low)
        high = tl.where(many <= few, y, high)
        # A side that is 0 says only which way to go.
        newton = (many > 0) & (few > 0)
        many = tl.where(newton, many, 1.0)
        few = tl.where(newton, few, 1.0)
        slope = tl.sum(below_slope.to(tl.float64), axis=0) / many + tl.sum(above_slope.to(tl.float64), axis=0) / few
        newton = newton & (slope > 0)
        step = tl.log(many / few) / tl.where(newton, slope, 1.0)
        newton = newton & (y + step > low) & (y + step < high) & (tl.abs(step) < 0.5 * last_step)
        middle = 0.5 * (low + high)
        unsettled = (low < middle) & (middle < high) & (high - low > resolution)
        unsettled = unsettled & ((newton == 0) | (tl.abs(step) > settled))
        following = tl.where(newton, y + step, middle)
        last_step = tl.abs(following - y)
        y = following

    tl.store(pivots + row, tl.where(valid, pivot, float("nan")))
    tl.store(offsets + row, tl.where(valid, y, float("nan")))
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        s = tl.load(scores + i, mask=i < n, other=0.0).to(FLOAT)
        x, q = _smaller_share(s, shrink, pivot, factor0, factor1, y.to(FLOAT))
        h = tl.where(x >= 0, 1 - q, q)
        tl.store(out + i, tl.where(valid, h, float("nan")), mask=i < n)


def _factors(temperature: float, most_exponents: int) -> tuple[float, float, float]:
    """Three factors of 1/T, since 1/T may overflow. The first shrinks scores where T is large: only there is a
    difference that overflows no sign of a sigmoid of 0 or 1."""
    mantissa, exponent = math.frexp(temperature)
    exponent = max(-most_exponents, min(exponent, most_exponents))
    shrink = 0.25 if exponent > 0 else 1.0
    exponent -= 2 * (exponent > 0)
    half = exponent // 2
    return shrink, math.ldexp(1 / mantissa, -half), math.ldexp(1.0, half - exponent)


def soft_topk(
    out: torch.Tensor, pivot: torch.Tensor, offset: torch.Tensor, scores: torch.Tensor, k: int, temperature: float
) -> None:
    """Fill out [R, n], pivot [R] (float64 for float64 scores, else float32) and offset float64 [R], contiguous, from
    scores [R, n], 0 < k < n."""
    rows = as_rows(scores)
    count, n = rows.shape
    wide = out.dtype == torch.float64
    kth_largest(rows, pivot, k)
    soft_topk_rows[(count,)](
        rows,
        rows.stride(0),
        out,
        pivot,
        offset,
        # Differences of floats, over a temperature of more binary digits, are 0 or infinite all the same.
        *_factors(temperature, 1074 if wide else 250),
        -709.0 if wide else -88.0,  # the k largest are 1
        math.log(n - k + 1),  # those from the pivot down sum to less than 1
        3e-9 if wide else 1e-4,  # a step of e leaves about e^2
        torch.finfo(out.dtype).eps,
        n,
        k,
        BLOCK=_BLOCK,
    )
