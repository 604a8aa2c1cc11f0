"""`packed_gram`: checks, public function, fake kernel, choice of backend. Definition: reference/."""

from __future__ import annotations

import torch

from robattr_fast import _extension, backends
from robattr_fast.ops import _schema
from robattr_fast.reference.packed_gram import check_packed
from robattr_fast.reference.packed_gram import packed_gram as _reference


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
    check_packed(rows, num_levels, other, mask)
    return torch.ops.robattr_fast.packed_gram(rows, num_levels, other, mask)


def _run(rows, num_levels, other, mask):
    return backends.call("packed_gram", rows, num_levels, other, mask)


def _run_cpu(rows, num_levels, other, mask):
    rows = rows.contiguous()
    second = rows if other is None else other.contiguous()
    out = rows.new_empty((rows.shape[0], second.shape[0]), dtype=torch.int64)
    torch.ops.robattr_fast_C.packed_gram(
        out, rows, second, None if mask is None else mask.contiguous(), num_levels, other is None
    )
    return out


def _run_triton(rows, num_levels, other, mask):
    from robattr_fast.kernels.packed_gram import packed_gram as launch

    out = rows.new_empty((rows.shape[0], (rows if other is None else other).shape[0]), dtype=torch.int64)
    launch(out, rows, other, mask, num_levels)
    return out


backends.register("packed_gram", "triton", _run_triton, _extension.can_run_triton)
backends.register("packed_gram", "reference", _reference, _extension.can_run_anywhere)
backends.register("packed_gram", "cpu", _run_cpu, _extension.can_run_cpu)
_schema.PUBLIC.impl("packed_gram", _run, "CPU")
_schema.PUBLIC.impl("packed_gram", _run, "CUDA")


@torch.library.register_fake("robattr_fast::packed_gram", lib=_schema.PUBLIC)
def _fake(rows, num_levels, other, mask):
    return rows.new_empty((rows.shape[0], (rows if other is None else other).shape[0]), dtype=torch.int64)
