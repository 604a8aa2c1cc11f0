"""Conversion to the dtype of a result."""

import triton
import triton.language as tl

from robattr_fast.kernels._stream import INTERPRETED


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """value as dtype, to nearest even; float32 where dtype is bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        # By hand: the interpreter's conversion truncates.
        bits = value.to(tl.int32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        upper = tl.where(value == value, upper, 0x7FC0)  # of a NaN the addition may overflow
        return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)
