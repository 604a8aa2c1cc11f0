"""Soft top-k; definition: robattr_fast/reference/soft_topk.py.

One program solves one row, in as many passes over it as Newton's method, kept inside of a bracket, needs. With
x_i = s_i / T - v and q = sigmoid(-|x|) the sum of h exceeds k by
    (below + max(count - k, 0)) - (above + max(k - count, 0)),
count the number of x >= 0, above and below the sums of q over these and over the others: nothing cancels. The logarithms
of the two sides are nearly straight lines in v near the root. x is formed as a difference of scores from a pivot near
nu = v T, so that float32 keeps its digits where T is small.
"""

import math

import torch
import triton
import triton.language as tl

_MOST_PASSES = 400  # bisection alone needs fewer, whatever the row


@triton.jit
def _scores(row, first, n, FLOAT: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the row; what lies past its end is -inf, of which sigmoids are 0."""
    i = first + tl.arange(0, BLOCK)
    return tl.load(row + i, mask=i < n, other=-float("inf")).to(FLOAT)


@triton.jit
def _smaller_share(s, shrink, pivot, factor0, factor1, y):
    """x, and q = sigmoid(-|x|)."""
    x = (s * shrink - pivot * shrink) * factor0 * factor1 - y
    e = tl.exp(-tl.abs(x))
    return x, e / (e + 1)


@triton.jit
def _keys(s, KEY: tl.constexpr):
    """Integers in the order of the scores."""
    bits = s.to(KEY, bitcast=True)
    return tl.where(bits < 0, bits ^ KEY_MAGNITUDE(KEY), bits)


@triton.jit
def _soft_topk(
    scores,  # [rows, n], contiguous
    out,  # [rows, n]
    pivots,  # [rows]
    offsets,  # [rows]: nu = pivot + T offset
    shrink: tl.float64,
    factor0: tl.float64,
    factor1: tl.float64,
    lowest: tl.float64,
    highest: tl.float64,
    settled: tl.float64,
    k,
    n,
    FLOAT: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = scores + tl.program_id(0).to(tl.int64) * n
    out_row = out + tl.program_id(0).to(tl.int64) * n
    shrink = shrink.to(FLOAT)
    factor0 = factor0.to(FLOAT)
    factor1 = factor1.to(FLOAT)
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


def soft_topk(out: torch.Tensor, level: torch.Tensor, scores: torch.Tensor, k: int, temperature: float) -> None:
    """Fill out [rows, n] and level float64 [rows], contiguous, from scores [rows, n]."""
    rows, n = scores.shape
    double = out.dtype == torch.float64
    # Differences of floats, over a temperature of more binary digits, are 0 or infinite all the same.
    shrink, factor0, factor1 = _factors(temperature, 1074 if double else 250)
    _soft_topk[(rows,)](
        scores.contiguous(),
        out,
        level,
        temperature,
        shrink,
        factor0,
        factor1,
        math.log(k) - math.log(n - k),
        3e-9 if double else 1e-4,  # a step of e leaves about e^2
        k,
        n,
        FLOAT=tl.float64 if double else tl.float32,
        MOST_PASSES=_MOST_PASSES,
        BLOCK=1024,
    )
