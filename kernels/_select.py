"""Exact selection of rows: which scores are in the support of the sparsified map, and the k-th largest itself.

Scores become unsigned integers of the same order: -inf < ... < -0 = +0 < ... < +inf < NaN. A row of up to ONE_BLOCK
elements is searched bit by bit in the registers of one program. A longer one is read once per 8-bit digit, most
significant first: every program counts the digits of its part, and integer atomics add the counts up. How much work
that is does not depend on the values, and the result not on the order.
"""

import torch
import triton
import triton.language as tl

ONE_BLOCK = 16384
_BINS = tl.constexpr(256)
_PART = 2048


@triton.constexpr_function
def _zero(wide):
    """The key of 0, which is also the sign bit."""
    return 1 << 63 if wide else 1 << 31


@triton.constexpr_function
def _infinity(wide):
    return 0xFFF << 52 if wide else 0x1FF << 23


@triton.constexpr_function
def _ones(wide):
    """The key of NaN."""
    return (1 << 64) - 1 if wide else (1 << 32) - 1


@triton.jit
def ordered_key(x, WIDE: tl.constexpr):
    """Floats -> uint32, or uint64 where WIDE, of the same order. No key is 0."""
    bits = x.to(tl.float64).to(tl.uint64, bitcast=True) if WIDE else x.to(tl.float32).to(tl.uint32, bitcast=True)
    key = tl.where(bits >= _zero(WIDE), bits ^ _ones(WIDE), bits | _zero(WIDE))
    key = tl.where((bits | _zero(WIDE)) == _zero(WIDE), _zero(WIDE), key)
    return tl.where((bits | _zero(WIDE)) > _infinity(WIDE), _ones(WIDE), key)


@triton.jit
def from_key(key, WIDE: tl.constexpr):
    """The float of a key: float64 where WIDE, else float32."""
    bits = tl.where(key >= _zero(WIDE), key ^ _zero(WIDE), key ^ _ones(WIDE))
    return bits.to(tl.float64, bitcast=True) if WIDE else bits.to(tl.float32, bitcast=True)


@triton.jit
def _is_finite(key, WIDE: tl.constexpr):
    return (key < _infinity(WIDE)) & (key > (_infinity(WIDE) ^ _ones(WIDE)))


@triton.jit
def _kth_largest(keys, k, WIDE: tl.constexpr):
    """The k-th largest of keys. Bits are set from the top while k keys stay at or above; exactly k end it early."""
    bit = tl.full((), _zero(WIDE), keys.dtype)
    bound = tl.full((), 0, keys.dtype)
    while bit != 0:
        above = tl.sum((keys >= (bound | bit)).to(tl.int32), axis=0)
        bound = tl.where(above >= k, bound | bit, bound)
        bit = tl.where(above == k, 0, bit >> 1)
    return tl.min(tl.where(keys >= bound, keys, _ones(WIDE)), axis=0)


@triton.jit
def _store_support(least, g, key_tau, fits, key_gamma, valid, WIDE: tl.constexpr):
    """The support is every score >= least. Ties at the threshold that do not all fit lie just below it."""
    smallest = tl.where(fits, key_tau, key_tau + 1)
    smallest = tl.where(smallest > _zero(WIDE), smallest, _zero(WIDE) + 1)
    tl.store(least, from_key(tl.where(valid, smallest, _ones(WIDE)), WIDE))
    tl.store(g, from_key(tl.where(key_gamma > _zero(WIDE), key_gamma, _zero(WIDE)), WIDE))


@triton.jit(do_not_specialize=["n", "k_tau", "k_gamma"])
def select_in_one_block(
    scores,  # [R, n], rows row_stride apart
    row_stride,
    least,  # [R]: without SUPPORT the k_tau-th largest; with it the least score of the support, NaN for an invalid row
    g,  # [R]: with SUPPORT the k_gamma-th largest, or 0 where that is negative
    n,
    k_tau,
    k_gamma,
    SUPPORT: tl.constexpr,
    RANKS: tl.constexpr,  # 1: k_gamma is k_tau
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < n
    x = tl.load(scores + row * row_stride + i, mask=inside, other=0.0)
    keys = tl.where(inside, ordered_key(x, WIDE), 0)
    key_tau = _kth_largest(keys, k_tau, WIDE)
    if SUPPORT:
        key_gamma = key_tau
        if RANKS == 2:
            key_gamma = _kth_largest(keys, k_gamma, WIDE)
        fits = tl.sum((keys >= key_tau).to(tl.int32), axis=0) <= k_tau
        valid = tl.sum((inside & ~_is_finite(keys, WIDE)).to(tl.int32), axis=0) == 0
        _store_support(least + row, g + row, key_tau, fits, key_gamma, valid, WIDE)
    else:
        tl.store(least + row, from_key(key_tau, WIDE))


@triton.jit
def _leading_digits(histograms, k, passes, WIDE: tl.constexpr):
    """The first ``passes`` digits of the k-th largest key, and its rank among the keys that share them."""
    digits = tl.arange(0, _BINS)
    prefix = tl.full((), 0, tl.uint64 if WIDE else tl.uint32)
    for p in range(passes):
        count = tl.load(histograms + p * _BINS + digits)
        at_least = tl.cumsum(count, axis=0, reverse=True)
        digit = tl.sum((at_least >= k).to(tl.int32), axis=0) - 1
        k = k - tl.sum(tl.where(digits > digit, count, 0), axis=0)
        prefix = (prefix << 8) | digit.to(prefix.dtype)
    return prefix, k


@triton.jit(do_not_specialize=["n", "k_tau", "k_gamma", "passes"])
def count_digits(
    scores,  # [R, n], rows row_stride apart
    row_stride,
    histograms,  # int32 [R, RANKS, DIGITS, 256]; those of the first ``passes`` digits are complete, the next is made
    nonfinite,  # int32 [R], made where SUPPORT
    n,
    k_tau,
    k_gamma,
    passes,
    span,  # elements per program, a multiple of BLOCK
    SUPPORT: tl.constexpr,
    RANKS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DIGITS: tl.constexpr = 8 if WIDE else 4
    row = tl.program_id(0).to(tl.int64)
    of_tau = histograms + row * (RANKS * DIGITS * _BINS)
    of_gamma = of_tau + DIGITS * _BINS
    prefix_tau, _ = _leading_digits(of_tau, k_tau.to(tl.int32), passes, WIDE)
    count_tau = tl.zeros((_BINS,), tl.int32)
    prefix_gamma = prefix_tau
    count_gamma = count_tau
    if RANKS == 2:
        prefix_gamma, _ = _leading_digits(of_gamma, k_gamma.to(tl.int32), passes, WIDE)
    bad = tl.zeros((BLOCK,), tl.int32)
    start = tl.program_id(1) * span
    for first in range(start, min(start + span, n), BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < n
        keys = ordered_key(tl.load(scores + row * row_stride + i, mask=inside, other=0.0), WIDE)
        leading = keys >> (8 * (DIGITS - 1 - passes))
        digit = (leading & 255).to(tl.int32)
        count_tau += tl.histogram(digit, _BINS, mask=inside & ((leading >> 8) == prefix_tau))
        if RANKS == 2:
            count_gamma += tl.histogram(digit, _BINS, mask=inside & ((leading >> 8) == prefix_gamma))
        if SUPPORT:
            bad += (inside & ~_is_finite(keys, WIDE)).to(tl.int32)
    bins = passes * _BINS + tl.arange(0, _BINS)
    tl.atomic_add(of_tau + bins, count_tau, mask=count_tau != 0, sem="relaxed")
    if RANKS == 2:
        tl.atomic_add(of_gamma + bins, count_gamma, mask=count_gamma != 0, sem="relaxed")
    if SUPPORT:
        found = tl.sum(bad, axis=0)
        tl.atomic_add(nonfinite + row, found, mask=(passes == 0) & (found != 0), sem="relaxed")


@triton.jit(do_not_specialize=["k_tau", "k_gamma"])
def read_histograms(
    histograms,  # int32 [R, RANKS, DIGITS, 256], complete
    nonfinite,  # int32 [R]
    least,  # [R], as of select_in_one_block
    g,  # [R]
    k_tau,
    k_gamma,
    SUPPORT: tl.constexpr,
    RANKS: tl.constexpr,
    WIDE: tl.constexpr,
):
    DIGITS: tl.constexpr = 8 if WIDE else 4
    row = tl.program_id(0).to(tl.int64)
    of_tau = histograms + row * (RANKS * DIGITS * _BINS)
    key_tau, rank = _leading_digits(of_tau, k_tau.to(tl.int32), DIGITS, WIDE)
    if SUPPORT:
        key_gamma = key_tau
        if RANKS == 2:
            key_gamma, _ = _leading_digits(of_tau + DIGITS * _BINS, k_gamma.to(tl.int32), DIGITS, WIDE)
        equal = tl.load(of_tau + (DIGITS - 1) * _BINS + (key_tau & 255).to(tl.int32))
        valid = tl.load(nonfinite + row) == 0
        _store_support(least + row, g + row, key_tau, equal <= rank, key_gamma, valid, WIDE)
    else:
        tl.store(least + row, from_key(key_tau, WIDE))


def as_rows(scores: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [R, n] whose rows are contiguous, copied only where they are not."""
    rows = scores.reshape(-1, scores.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _select(rows: torch.Tensor, least: torch.Tensor, g: torch.Tensor, k_tau: int, k_gamma: int, support: bool) -> None:
    count, n = rows.shape
    wide = rows.dtype == torch.float64
    ranks = 1 if k_gamma == k_tau else 2
    options = {"SUPPORT": support, "RANKS": ranks, "WIDE": wide}
    if n <= ONE_BLOCK:
        block = max(32, triton.next_power_of_2(n))
        select_in_one_block[(count,)](
            rows, rows.stride(0), least, g, n, k_tau, k_gamma, **options, BLOCK=block, num_warps=max(1, block // 1024)
        )
        return
    digits = 8 if wide else 4
    histograms = torch.zeros(count, ranks, digits, _BINS.value, dtype=torch.int32, device=rows.device)
    nonfinite = torch.zeros(count, dtype=torch.int32, device=rows.device)
    # Up to eight parts per program, once there are programs enough to fill any device.
    span = _PART * min(8, max(1, count * n // (1024 * _PART)))
    for passes in range(digits):
        count_digits[(count, triton.cdiv(n, span))](
            rows, rows.stride(0), histograms, nonfinite, n, k_tau, k_gamma, passes, span, **options, BLOCK=_PART
        )
    read_histograms[(count,)](histograms, nonfinite, least, g, k_tau, k_gamma, **options)


def kth_largest(rows: torch.Tensor, out: torch.Tensor, k: int) -> None:
    """out [R] = the k-th largest of each row of rows [R, n]."""
    _select(rows, out, out, k, k, support=False)


def support(rows: torch.Tensor, k_tau: int, k_gamma: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(least, g), both [R]: the support of row r is every score >= least[r], NaN if r holds NaN or inf."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    least, g = rows.new_empty((2, rows.shape[0]), dtype=dtype)
    _select(rows, least, g, k_tau, k_gamma, support=True)
    return least, g


@triton.jit
def quotient(a, b):
    """a / b as IEEE rounds it; Triton's own / of float32 is an approximation."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)
