"""The sparsified map of each row; definition: robattr_fast/reference/sparsify.py."""

import torch
import triton
import triton.language as tl

from robattr_fast.kernels._select import as_rows, quotient, support

_BLOCK = 1024


@triton.jit
def sparsify_rows(
    scores,  # [R, n], rows row_stride apart
    row_stride,
    out,  # [R, n]
    least,  # [R]
    g,  # [R]
    n,
    blocks,  # of a row
    LEVELS: tl.constexpr,  # 0: not rounded
    BLOCK: tl.constexpr,
):
    # Axis 0 may hold 2^31 - 1 programs, axis 1 only 65535.
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    bound = tl.load(least + row)
    top = tl.load(g + row)
    s = tl.load(scores + row * row_stride + i, mask=inside, other=0.0).to(bound.dtype)
    if LEVELS == 0:
        h = tl.where(s < top, quotient(s, tl.zeros_like(s) + top), 1.0)
    else:
        level = tl.zeros((BLOCK,), tl.int32)
        for step in tl.static_range(LEVELS):
            level += (s > top * (step / LEVELS)).to(tl.int32)
        h = quotient(level.to(bound.dtype), tl.full((BLOCK,), LEVELS, bound.dtype))
    h = tl.where(s >= bound, h, 0.0)
    tl.store(out + row * n + i, tl.where(bound == bound, h, float("nan")), mask=inside)


def sparsify(scores: torch.Tensor, out: torch.Tensor, k_tau: int, k_gamma: int, levels: int | None) -> None:
    """Fill out (contiguous, the shape of scores; float64 for float64 scores, else float32) from scores [..., n]."""
    rows = as_rows(scores)
    count, n = rows.shape
    least, g = support(rows, k_tau, k_gamma)
    blocks = triton.cdiv(n, _BLOCK)
    sparsify_rows[(count * blocks,)](rows, rows.stride(0), out, least, g, n, blocks, LEVELS=levels or 0, BLOCK=_BLOCK)
