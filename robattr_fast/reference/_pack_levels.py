"""Packed levels: the definition. One bit per element of a map with two values, one nibble of one with up to 16."""

import torch
from torch import Tensor

#: Rows are padded with zero bits to a multiple of this many bytes, so that a kernel may read whole 512-bit words.
ROW_ALIGNMENT = 64


def bits_per_element(num_levels: int) -> int:
    """1 for ``num_levels`` = 1, 4 for 2 to 15; ValueError otherwise."""
    if not 1 <= num_levels <= 15:
        raise ValueError(f"num_levels must be between 1 and 15, got {num_levels}")
    return 1 if num_levels == 1 else 4


def packed_row_bytes(n: int, num_levels: int) -> int:
    """Bytes of one packed row of ``n`` elements."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return -(-n * bits_per_element(num_levels) // (8 * ROW_ALIGNMENT)) * ROW_ALIGNMENT


def pack_levels(levels: Tensor, num_levels: int) -> Tensor:
    """Packs levels: uint8 ``[..., n]``, values in 0..``num_levels`` -> uint8 ``[..., row_bytes]``.

    ``num_levels`` = 1: element e is bit e%8 of byte e//8. 2 to 15: element e is nibble e%2, low nibble first, of
    byte e//2. Rows end in zero bits up to a multiple of 64 bytes.
    """
    per_byte = 8 // bits_per_element(num_levels)
    if levels.dtype != torch.uint8:
        raise TypeError(f"levels must be uint8, got {levels.dtype}")
    if levels.dim() < 1 or levels.shape[-1] < 1:
        raise ValueError(f"levels must have shape [..., n] with n >= 1, got {list(levels.shape)}")
    if levels.numel() and int(levels.max()) > num_levels:
        raise ValueError(f"levels must not exceed num_levels = {num_levels}, got {int(levels.max())}")
    n = levels.shape[-1]
    row_bytes = packed_row_bytes(n, num_levels)
    padded = torch.nn.functional.pad(levels, (0, row_bytes * per_byte - n))
    groups = padded.unflatten(-1, (row_bytes, per_byte))
    packed = torch.zeros_like(groups[..., 0])
    for position in range(per_byte):
        packed |= groups[..., position] << (position * 8 // per_byte)
    return packed


def unpack_levels(rows: Tensor, num_levels: int, n: int | None = None) -> Tensor:
    """The inverse of :func:`pack_levels`: uint8 ``[..., row_bytes]`` -> uint8 ``[..., n]`` (None: padding included)."""
    bits = bits_per_element(num_levels)
    if rows.dtype != torch.uint8:
        raise TypeError(f"rows must be uint8, got {rows.dtype}")
    per_byte = 8 // bits
    parts = [(rows >> (position * bits)) & (2**bits - 1) for position in range(per_byte)]
    levels = torch.stack(parts, dim=-1).flatten(-2)
    if n is None:
        return levels
    if not 1 <= n <= levels.shape[-1]:
        raise ValueError(f"n must be between 1 and the {levels.shape[-1]} elements of a row, got {n}")
    return levels[..., :n]
