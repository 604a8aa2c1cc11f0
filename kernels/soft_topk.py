"""Soft top-k; definition: robattr_fast/reference/soft_topk.py.

One program solves one row. First the pivot, the k-th largest score, by bisection over integers that are ordered as the
scores are; then the offset by Newton's method, kept inside of a bracket. With x_i = (s_i - pivot) / T - y and
q = sigmoid(-|x|) the sum of h exceeds k by
    (below + max(count - k, 0)) - (above + max(k - count, 0)),
count the number of x >= 0, above and below the sums of q over these and over the others: nothing cancels, and the
logarithms of the two sides are nearly straight lines in y near the root.
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def _scores(row, first, n, FLOAT: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the row; what lies past its end is -inf, of which sigmoids are 0."""
    i = first + tl.arange(0, BLOCK)
    return tl.load(row + i, mask=i < n, other=-float("inf")).to(FLOAT)


@triton.jit
def _reversed_below_zero(bits, DOUBLE: tl.constexpr):
    """Bits of floats <-> integers in the order of the floats."""
    if DOUBLE:
        return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    else:
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _smaller_share(s, shrink, pivot, factor0, factor1, y):
    """x, and q = sigmoid(-|x|)."""
    x = (s * shrink - pivot * shrink) * factor0 * factor1 - y
    e = tl.exp(-tl.abs(x))
    return x, e / (e + 1)


@triton.jit
def _soft_topk(
    scores,  # [rows, n], contiguous
    out,  # [rows, n]
    pivots,  # [rows]
    offsets,  # [rows]: nu = pivot + T offset
    shrink: tl.float64,
    factor0: tl.float64,
    factor1: tl.float64,
    lowest: tl.float64,  # the bracket of all offsets
    highest: tl.float64,
    settled: tl.float64,
    resolution: tl.float64,
    k,
    n,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    FLOAT: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    KEY: tl.constexpr = tl.int64 if DOUBLE else tl.int32
    row = scores + tl.program_id(0).to(tl.int64) * n
    out_row = out + tl.program_id(0).to(tl.int64) * n

    finite = tl.zeros((BLOCK,), tl.int32)
    least = tl.full((BLOCK,), float("inf"), FLOAT)
    most = tl.full((BLOCK,), -float("inf"), FLOAT)
    for first in range(0, n, BLOCK):
        s = _scores(row, first, n, FLOAT, BLOCK)
        is_finite = tl.abs(s) < float("inf")
        finite += is_finite.to(tl.int32)
        least = tl.where(is_finite, tl.minimum(least, s), least)
        most = tl.where(is_finite, tl.maximum(most, s), most)
    valid = tl.sum(finite) == n

    # The largest key that k scores reach.
    key = _reversed_below_zero(tl.min(least).to(KEY, bitcast=True), DOUBLE)
    key_end = _reversed_below_zero(tl.max(most).to(KEY, bitcast=True), DOUBLE)
    while valid & (key < key_end):
        # Up, so that it ends; the two may be of opposite sign and their difference too large for the type.
        middle = (key >> 1) + (key_end >> 1) + ((key | key_end) & 1)
        reach = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, n, BLOCK):
            s = _scores(row, first, n, FLOAT, BLOCK)
            reach += (_reversed_below_zero(s.to(KEY, bitcast=True), DOUBLE) >= middle).to(tl.int32)
        enough = tl.sum(reach) >= k
        key = tl.where(enough, middle, key)
        key_end = tl.where(enough, key_end, middle - 1)
    pivot = _reversed_below_zero(key, DOUBLE).to(FLOAT, bitcast=True)

    # Numbers become tensors of one type: of the loop's variables none may change its own.
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
            s = _scores(row, first, n, FLOAT, BLOCK)
            x, q = _smaller_share(s, shrink, pivot, factor0, factor1, y.to(FLOAT))
            up = x >= 0
            above += tl.where(up, q, 0.0)
            below += tl.where(up, 0.0, q)
            above_slope += tl.where(up, q * (1 - q), 0.0)
            below_slope += tl.where(up, 0.0, q * (1 - q))
            counts += up.to(tl.int32)
        count = tl.sum(counts)
        many = tl.sum(below.to(tl.float64)) + tl.maximum(count - k, 0)
        few = tl.sum(above.to(tl.float64)) + tl.maximum(k - count, 0)
        low = tl.where(many >= few, y, low)
        high = tl.where(many <= few, y, high)
        # A side that is 0 says only which way to go.
        newton = (many > 0) & (few > 0)
        many = tl.where(newton, many, 1.0)
        few = tl.where(newton, few, 1.0)
        slope = tl.sum(below_slope.to(tl.float64)) / many + tl.sum(above_slope.to(tl.float64)) / few
        newton = newton & (slope > 0)
        step = tl.log(many / few) / tl.where(newton, slope, 1.0)
        newton = newton & (y + step > low) & (y + step < high) & (tl.abs(step) < 0.5 * last_step)
        middle_y = 0.5 * (low + high)
        unsettled = ((low < middle_y) & (middle_y < high) & (high - low > resolution)) & (
            (newton == 0) | (tl.abs(step) > settled)
        )
        following = tl.where(newton, y + step, middle_y)
        last_step = tl.abs(following - y)
        y = following

    y = tl.where(valid, y, float("nan"))
    tl.store(pivots + tl.program_id(0), tl.where(valid, pivot, float("nan")))
    tl.store(offsets + tl.program_id(0), y)
    for first in range(0, n, BLOCK):
        s = _scores(row, first, n, FLOAT, BLOCK)
        x, q = _smaller_share(s, shrink, pivot, factor0, factor1, y.to(FLOAT))
        h = tl.where(valid, tl.where(x >= 0, 1 - q, q), float("nan"))
        i = first + tl.arange(0, BLOCK)
        tl.store(out_row + i, h, mask=i < n)


def _factors(temperature: float, most_exponents: int) -> tuple[float, float, float]:
    """shrink, factor0, factor1 with shrink * factor0 * factor1 = 1/T; 1/T alone may overflow.

    Scores are shrunk where T is large: only there differences that overflow are no sign of a sigmoid of 0 or 1.
    """
    mantissa, exponent = math.frexp(temperature)
    exponent = max(-most_exponents, min(exponent, most_exponents))
    shrink = 0.25 if exponent > 0 else 1.0
    exponent -= 2 * (exponent > 0)
    half = exponent // 2
    return shrink, math.ldexp(1 / mantissa, -half), math.ldexp(1.0, half - exponent)


def soft_topk(
    out: torch.Tensor, pivot: torch.Tensor, offset: torch.Tensor, scores: torch.Tensor, k: int, temperature: float
) -> None:
    """Fill out [rows, n], pivot [rows] and offset float64 [rows], contiguous, from scores [rows, n], 0 < k < n."""
    rows, n = scores.shape
    double = out.dtype == torch.float64
    # Differences of floats, over a temperature of more binary digits, are 0 or infinite all the same.
    shrink, factor0, factor1 = _factors(temperature, 1074 if double else 250)
    _soft_topk[(rows,)](
        scores.contiguous(),
        out,
        pivot,
        offset,
        shrink,
        factor0,
        factor1,
        -709.0 if double else -88.0,  # the k largest are 1
        math.log(n - k + 1),  # those from the pivot down sum to less than 1
        3e-9 if double else 1e-4,  # a Newton step of e leaves about e^2
        torch.finfo(out.dtype).eps,
        k,
        n,
        DOUBLE=double,
        BLOCK=1024,
    )
