"""Integer inner products of packed rows: the definition."""

import torch
from torch import Tensor

from robattr_fast.reference._autocast import without_autocast
from robattr_fast.reference._pack_levels import ROW_ALIGNMENT, bits_per_element, unpack_levels

# A float32 sum of products of levels is exact below 2^24: 15 * 15 * 2^14 is.
_BLOCK_ELEMENTS = 2**14


def check_packed(rows: Tensor, num_levels: int, other: Tensor | None, mask: Tensor | None) -> None:
    """Raises unless the arguments of :func:`packed_gram` fit each other."""
    bits_per_element(num_levels)
    for name, tensor, dims in (("rows", rows, 2), ("other", other, 2), ("mask", mask, 1)):
        if tensor is None:
            continue
        if tensor.dtype != torch.uint8:
            raise TypeError(f"{name} must be uint8, got {tensor.dtype}")
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimension(s), got shape {list(tensor.shape)}")
        if tensor.shape[-1] == 0 or tensor.shape[-1] % ROW_ALIGNMENT:
            raise ValueError(f"{name} must have rows of a multiple of {ROW_ALIGNMENT} bytes, got {tensor.shape[-1]}")
        if tensor.shape[-1] != rows.shape[-1]:
            raise ValueError(f"{name} must have rows of {rows.shape[-1]} bytes like rows, got {tensor.shape[-1]}")


@without_autocast
def packed_gram(rows: Tensor, num_levels: int, other: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Inner products of packed rows, in units of levels (divide by ``num_levels ** 2`` for maps in [0, 1]).

    rows: uint8 ``[m, row_bytes]`` as :func:`~robattr_fast.reference.pack_levels` makes them.
    other: uint8 ``[m2, row_bytes]``; None means ``rows`` itself. A Gram matrix grows by one call for new rows against
    old ones and one for new rows among themselves.
    mask: uint8 ``[row_bytes]``, ANDed to each row: weights 0 (no bit of an element) or 1 (all its bits).
    Returns int64 ``[m, m2]``.
    """
    check_packed(rows, num_levels, other, mask)
    second = rows if other is None else other
    gram = torch.zeros(rows.shape[0], second.shape[0], dtype=torch.int64, device=rows.device)
    step = _BLOCK_ELEMENTS * bits_per_element(num_levels) // 8

    def block(packed: Tensor, start: int) -> Tensor:
        part = packed[:, start : start + step]
        if mask is not None:
            part = part & mask[start : start + step]
        return unpack_levels(part, num_levels).to(torch.float32)

    for start in range(0, rows.shape[1], step):
        left = block(rows, start)
        right = left if other is None else block(second, start)
        gram += (left @ right.T).to(torch.int64)
    return gram
