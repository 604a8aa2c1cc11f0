"""Integer inner products of packed rows; definition: robattr_fast/reference/packed_gram.py.

The p-th elements of all bytes make a matrix of int8, and the inner product is the sum over p of products of such: both
sides have the same order of elements, so nothing is rearranged. Tensor cores multiply, int32 holds the sums of a span,
and spans are added up as int64 by atomics, in any order.
"""

import torch
import triton
import triton.language as tl

_TILE, _BYTES = 64, 32
# 15 * 15 * 2 elements per byte: less than 2^31.
_LARGEST_SPAN = 1 << 22
_PROGRAMS = 1024


@triton.jit
def gram_tile(
    rows,  # uint8 [m, row_bytes]
    other,  # uint8 [m2, row_bytes]
    mask,  # uint8 [row_bytes] where MASKED
    out,  # int64 [m, m2], added to
    m,
    m2,
    row_bytes,
    span,  # bytes of each row that one program takes
    BITS: tl.constexpr,  # per element
    MASKED: tl.constexpr,
    SYMMETRIC: tl.constexpr,  # other is rows: tiles above the diagonal are left out
    TILE: tl.constexpr,
    BYTES: tl.constexpr,
):
    if SYMMETRIC and tl.program_id(1) > tl.program_id(0):
        return
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    left = rows + i.to(tl.int64)[:, None] * row_bytes
    right = other + j.to(tl.int64)[:, None] * row_bytes
    first = tl.program_id(2) * span
    sums = tl.zeros((TILE, TILE), tl.int32)
    for start in range(first, min(first + span, row_bytes), BYTES):
        byte = start + tl.arange(0, BYTES)
        a = tl.load(left + byte[None, :], mask=(i < m)[:, None], other=0)
        b = tl.load(right + byte[None, :], mask=(j < m2)[:, None], other=0)
        if MASKED:
            chosen = tl.load(mask + byte)[None, :]
            a = a & chosen
            b = b & chosen
        for place in tl.static_range(0, 8, BITS):
            a_place = ((a >> place) & ((1 << BITS) - 1)).to(tl.int8)
            b_place = ((b >> place) & ((1 << BITS) - 1)).to(tl.int8)
            sums = tl.dot(a_place, tl.trans(b_place), sums, out_dtype=tl.int32)
    inside = (i < m)[:, None] & (j < m2)[None, :]
    tl.atomic_add(out + i.to(tl.int64)[:, None] * m2 + j[None, :], sums.to(tl.int64), mask=inside, sem="relaxed")


def packed_gram(
    out: torch.Tensor, rows: torch.Tensor, other: torch.Tensor | None, mask: torch.Tensor | None, num_levels: int
) -> None:
    """Fill out int64 [m, m2] (contiguous) from uint8 rows [m, row_bytes], other [m2, row_bytes], mask [row_bytes]."""
    rows = rows.contiguous()
    second = rows if other is None else other.contiguous()
    (m, row_bytes), m2 = rows.shape, second.shape[0]
    tiles = triton.cdiv(m, _TILE), triton.cdiv(m2, _TILE)
    splits = max(1, _PROGRAMS // (tiles[0] * tiles[1]))
    span = min(_LARGEST_SPAN, triton.cdiv(row_bytes, splits * _BYTES) * _BYTES)
    out.zero_()
    gram_tile[(*tiles, triton.cdiv(row_bytes, span))](
        rows,
        second,
        rows if mask is None else mask.contiguous(),
        out,
        m,
        m2,
        row_bytes,
        span,
        BITS=1 if num_levels == 1 else 4,
        MASKED=mask is not None,
        SYMMETRIC=other is None,
        TILE=_TILE,
        BYTES=_BYTES,
    )
    if other is None:
        out.copy_(out.tril() + out.tril(-1).T)
