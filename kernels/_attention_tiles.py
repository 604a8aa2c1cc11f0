"""Tiles of the two sides of kernel attention, and products of them; `_attention_passes` is made of them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from robattr_fast.kernels._rounding import rounded
from robattr_fast.kernels._select import quotient

K = tl.constexpr(16)
"""The length of every inner product: operands stay in registers, K to a row."""


class Array(NamedTuple):
    """A tensor [B, H, N, width] whose last stride is 1, and its other strides."""

    data: torch.Tensor
    batch: int
    head: int
    row: int


class Side(NamedTuple):
    """Rows: x = q, u = u_q, y = grad; u_y is not read. Keys: x = k, u = u_k, y = v, u_y = u_v."""

    x: Array
    u: Array
    y: Array
    u_y: Array


@triton.jit
def _pointers(array, head, heads, i, c):
    start = array.data + (head // heads) * array.batch + (head % heads) * array.head
    return start + i.to(tl.int64)[:, None] * array.row + c[None, :]


@triton.jit
def load(array, head, heads, i, c, present, WIDTH: tl.constexpr, FLOAT: tl.constexpr):
    """Positions i, columns c; zeros where a position is not present, which may hold anything."""
    inside = present[:, None] & (c < WIDTH)[None, :]
    return tl.load(_pointers(array, head, heads, i, c), mask=inside, other=0.0).to(FLOAT)


@triton.jit
def store(array, head, heads, i, c, value, positions, WIDTH: tl.constexpr):
    inside = (i < positions)[:, None] & (c < WIDTH)[None, :]
    tl.store(_pointers(array, head, heads, i, c), rounded(value, array.data.dtype.element_ty), mask=inside)


@triton.jit
def feature_map(x, MAP: tl.constexpr):
    """phi, phi', phi''. NaN stays NaN, which a maximum would hide."""
    if MAP == "elu":
        phi = tl.where(x > 0, x + 1, tl.exp(x))
        slope = tl.where(x > 0, 1.0, phi)
        curvature = tl.where(x > 0, 0.0, phi)
    elif MAP == "relu":
        phi = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, tl.zeros_like(x))
        curvature = tl.zeros_like(x)
    elif MAP == "squared_relu":
        positive = tl.where(x <= 0, 0.0, x)
        phi = positive * positive
        slope = 2 * positive
        curvature = tl.where(x > 0, 2.0, tl.zeros_like(x))
    else:
        phi = x
        slope = tl.full(x.shape, 1.0, x.dtype)
        curvature = tl.zeros_like(x)
    return phi, slope, curvature


@triton.jit
def exists(mask, head, heads, i, positions, ROWS: tl.constexpr):
    """Which positions exist and, of keys, are kept."""
    present = i < positions
    if not ROWS and mask is not None:
        present = tl.load(mask + (head // heads) * positions + i, mask=present, other=0) != 0
    return present


@triton.jit
def load_features(
    side, head, heads, i, c, present, WIDTH: tl.constexpr, MAP: tl.constexpr, ORDER: tl.constexpr, FLOAT: tl.constexpr
):
    """f and f', zeros outside."""
    phi, slope, _ = feature_map(load(side.x, head, heads, i, c, present, WIDTH, FLOAT), MAP)
    f = tl.where(present[:, None] & (c < WIDTH)[None, :], phi, 0.0)
    f_dot = f
    if ORDER == 2:
        f_dot = slope * load(side.u, head, heads, i, c, present, WIDTH, FLOAT)
    return f, f_dot


@triton.jit
def scalars_of(scalars, index, head, positions):
    """Where r (0), e (1), rho (2) and e. (3) of the rows of a head start."""
    return scalars + (head * 4 + index) * positions


@triton.jit
def load_values(
    side,
    scalars,
    head,
    heads,
    i,
    c,
    present,
    positions,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ORDER: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """y and y', zeros outside."""
    y = load(side.y, head, heads, i, c, present, WIDTH, FLOAT)
    y_dot = y
    if ROWS:
        y *= tl.load(scalars_of(scalars, 0, head, positions) + i, mask=present, other=0.0)[:, None]
        if ORDER == 2:
            y_dot = -tl.load(scalars_of(scalars, 2, head, positions) + i, mask=present, other=0.0)[:, None] * y
    elif ORDER == 2:
        y_dot = load(side.u_y, head, heads, i, c, present, WIDTH, FLOAT)
    return y, y_dot


@triton.jit
def load_weights(scalars, head, i, present, positions, ROWS: tl.constexpr, ORDER: tl.constexpr, FLOAT: tl.constexpr):
    """c and c', zeros outside."""
    weight = present.to(FLOAT)
    weight_dot = tl.zeros_like(weight)
    if ROWS:
        weight = tl.load(scalars_of(scalars, 1, head, positions) + i, mask=present, other=0.0)
        if ORDER == 2:
            weight_dot = tl.load(scalars_of(scalars, 3, head, positions) + i, mask=present, other=0.0)
    return weight, weight_dot


@triton.jit
def state_of(states, head, part, parts, dot, ORDERS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr):
    """Where M, or with dot = 1 M', of a part starts, [D, DV] with m [D] behind it."""
    return states + ((head * parts + part) * ORDERS + dot) * (D * (DV + 1))


@triton.jit
def load_matrix(state, c, v, D: tl.constexpr, DV: tl.constexpr):
    return tl.load(state + c[:, None] * DV + v[None, :], mask=(c < D)[:, None] & (v < DV)[None, :], other=0.0)


@triton.jit
def load_total(state, c, D: tl.constexpr, DV: tl.constexpr):
    return tl.load(state + D * DV + c, mask=c < D, other=0.0)


@triton.jit
def add_product(x, y, to):
    """to + x y, each product and sum in the precision of its operands."""
    if to.dtype == tl.float64:
        # Triton 3.7 ends in an assertion where it would hand such products to matrix units.
        return to + tl.sum(x[:, :, None] * y[None, :, :], axis=1)
    else:
        return tl.dot(x, y, to, input_precision="ieee", out_dtype=to.dtype)


@triton.jit
def reciprocal(d):
    """1 / d, and 0 where that would overflow."""
    largest: tl.constexpr = 1.7976931348623157e308 if d.dtype == tl.float64 else 3.4028234663852886e38
    overflows = tl.abs(d) * largest < 1
    return tl.where(overflows, 0.0, quotient(tl.full(d.shape, 1.0, d.dtype), tl.where(overflows, 1.0, d)))


@triton.jit
def sees(i, j, ROWS: tl.constexpr):
    """Whether positions i of a causal side and j of the other meet: no row looks ahead."""
    if ROWS:
        met = j[None, :] <= i[:, None]
    else:
        met = j[None, :] >= i[:, None]
    return met


@triton.jit
def paired(first, start, span, positions, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """First and end of the positions of the causal part from ``start`` on that meet the block from ``first`` on."""
    if ROWS:
        low = start
        high = min(first + BLOCK, positions)
    else:
        low = first
        high = min(start + span, positions)
    return low, high
