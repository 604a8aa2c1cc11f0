"""`packed_gram`: checks, public function, kernels. Definition: reference/."""

from __future__ import annotations

import torch

from robattr_fast.ops import _check, _vmap
from robattr_fast.ops._register import register
from robattr_fast.reference.packed_gram import check_packed
from robattr_fast.reference.packed_gram import packed_gram as definition


def packed_gram(
    rows: torch.Tensor, num_levels: int, other: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Exact inner products of packed levels, in units of levels: divide by ``num_levels ** 2`` for maps in [0, 1].

    Args:
        rows: uint8 [m, row_bytes], packed as `reference.pack_levels` does: one bit per element for ``num_levels`` = 1,
            one nibble for 2 to 15, rows of a multiple of 64 bytes.
        num_levels: 1 to 15.
        other: uint8 [m2, row_bytes]; None means rows. To grow a Gram matrix, multiply the new rows with the old ones
            and with themselves.
        mask: uint8 [row_bytes]: elements with all bits set count, elements with no bit set do not.

    Returns:
        int64 [m, m2]. Not differentiable.

    Raises:
        TypeError, ValueError: an argument outside of what is named above.
    """
    num_levels = _check.integer("num_levels", num_levels, 1, _check.MAX_LEVELS)
    check_packed(rows, num_levels, other, mask)
    return _operator(rows, num_levels, other, mask)


def _fake(rows, num_levels, other, mask):
    return rows.new_empty((rows.shape[0], (rows if other is None else other).shape[0]), dtype=torch.int64)


def _cpu(rows, num_levels, other, mask, *, out):
    rows = rows.contiguous()
    second = rows if other is None else other.contiguous()
    kept = None if mask is None else mask.contiguous()
    torch.ops.robattr_fast_C.packed_gram(out, rows, second, kept, num_levels, other is None)


def _triton(rows, num_levels, other, mask, *, out):
    from robattr_fast.kernels.packed_gram import packed_gram as launch

    launch(out, rows, other, mask, num_levels)


_operator = register(
    "packed_gram", definition, fake=_fake, cpu=_cpu, triton=_triton, vmap=_vmap.one_by_one("packed_gram")
)
