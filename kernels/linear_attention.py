"""Kernel attention and its first two derivatives; definition and letters: robattr_fast/reference/linear_attention.py.

Rows and keys mirror each other. A side has features f, values y and a weight c per position, and each of them its
derivative in the direction of a double backward, written f', y', c':

    rows   f = a, f' = a.    y = w, y' = w. = -rho w    c = e, c' = e.
    keys   f = b, f' = b.    y = v, y' = v.             c = 1, c' = 0

The state of a side is M = sum f y^T with m = sum c f, and of the second order also
M' = sum f' y^T + f y'^T with m' = sum c f' + c' f. All that is wanted of one side comes from the state of the other:

    M^T f                 n of rows, grad v of keys          M'^T f + M^T f'            n. and (grad v).
    M y + c m             grad a of rows, grad b of keys     M' y + M y' + c m' + c' m  (grad a). and (grad b).

so four kernels do: `sum_parts` sums the states of parts of a side, `scan_parts` adds the parts up, `apply_features` and
`apply_values` multiply with them. Causal, a part is one block of positions, its state becomes that of all parts before
it (rows look back at keys) or behind it (keys look ahead to rows), and pairs within a block are multiplied as such.
Sums are formed in the same order whatever the device and the batch. Nothing of N x N exists.
"""

import torch
import triton
import triton.language as tl

from robattr_fast.kernels._linear_attention import (
    Array,
    K,
    Side,
    add_product,
    exists,
    feature_map,
    load,
    load_features,
    load_matrix,
    load_total,
    load_values,
    load_weights,
    reciprocal,
    scalars_of,
    sees,
    state_of,
    store,
)

# Positions that one program sums up where none is causal.
_SPAN = 512
_WARPS = 8


@triton.jit(do_not_specialize=["positions", "heads", "parts", "span"])
def sum_parts(
    side,  # a Side
    mask,  # uint8 [B, positions] of keys, or None
    scalars,  # [B H, 4, positions], of rows
    states,  # [B H, parts, ORDERS, D (DV + 1)], written
    positions,
    heads,
    parts,
    span,  # positions of a part, a multiple of K
    D: tl.constexpr,
    DV: tl.constexpr,
    MAP: tl.constexpr,
    ROWS: tl.constexpr,  # the side is that of the rows
    ORDER: tl.constexpr,  # 0: forward, 1: backward, 2: double backward
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    FLOAT: tl.constexpr = states.dtype.element_ty
    ORDERS: tl.constexpr = 2 if ORDER == 2 else 1
    head = tl.program_id(0).to(tl.int64) // parts
    part = tl.program_id(0) % parts
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    matrix = tl.zeros((BLOCK_D, BLOCK_V), FLOAT)
    matrix_dot = tl.zeros((BLOCK_D, BLOCK_V), FLOAT)
    total = tl.zeros((BLOCK_D,), FLOAT)
    total_dot = tl.zeros((BLOCK_D,), FLOAT)
    for first in range(part * span, min(part * span + span, positions), K):
        i = first + tl.arange(0, K)
        present = exists(mask, head, heads, i, positions, ROWS)
        f, f_dot = load_features(side, head, heads, i, c, present, D, MAP, ORDER, FLOAT)
        y, y_dot = load_values(side, scalars, head, heads, i, v, present, positions, DV, ROWS, ORDER, FLOAT)
        weight, weight_dot = load_weights(scalars, head, i, present, positions, ROWS, ORDER, FLOAT)
        matrix = add_product(tl.trans(f), y, matrix)
        total += tl.sum(weight[:, None] * f, axis=0)
        if ORDER == 2:
            matrix_dot = add_product(tl.trans(f_dot), y, matrix_dot)
            matrix_dot = add_product(tl.trans(f), y_dot, matrix_dot)
            total_dot += tl.sum(weight[:, None] * f_dot + weight_dot[:, None] * f, axis=0)
    inside = (c < D)[:, None] & (v < DV)[None, :]
    first_column = (c < D) & (tl.program_id(2) == 0)
    state = state_of(states, head, part, parts, 0, ORDERS, D, DV)
    tl.store(state + c[:, None] * DV + v[None, :], matrix, mask=inside)
    tl.store(state + D * DV + c, total, mask=first_column)
    if ORDER == 2:
        state = state_of(states, head, part, parts, 1, ORDERS, D, DV)
        tl.store(state + c[:, None] * DV + v[None, :], matrix_dot, mask=inside)
        tl.store(state + D * DV + c, total_dot, mask=first_column)


@triton.jit(do_not_specialize=["parts", "size"])
def scan_parts(
    states,  # [B H, parts, size]: causal, each part becomes the sum of those before it; else the first the sum of all
    parts,
    size,
    CAUSAL: tl.constexpr,
    BACKWARD: tl.constexpr,  # of those behind it
    BLOCK: tl.constexpr,
):
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    states += tl.program_id(0).to(tl.int64) * parts * size + i
    running = tl.zeros((BLOCK,), states.dtype.element_ty)
    for step in range(parts):
        part = tl.zeros((), tl.int64) + step
        if BACKWARD:
            part = parts - 1 - part
        value = tl.load(states + part * size, mask=i < size, other=0.0)
        if CAUSAL:
            tl.store(states + part * size, running, mask=i < size)
        running += value
    if not CAUSAL:
        tl.store(states, running, mask=i < size)


@triton.jit(do_not_specialize=["positions", "heads", "parts", "blocks"])
def apply_features(
    side,  # a Side
    other,  # the other Side
    mask,  # uint8 [B, positions] of keys, or None
    scalars,  # [B H, 4, positions] of the rows; written if they are the side
    states,  # of the other side, scanned
    visible,  # [B, positions]: how many keys a row sees, where not NORMALIZE
    out,  # Array [B, H, positions, DV], written but for the rows of ORDER 1: o or o. of rows, grad v or its dot of keys
    eps: tl.float64,
    positions,
    heads,
    parts,
    blocks,
    D: tl.constexpr,
    DV: tl.constexpr,
    MAP: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,  # causal: positions of a part
    BLOCK_V: tl.constexpr,
):
    FLOAT: tl.constexpr = states.dtype.element_ty
    ORDERS: tl.constexpr = 2 if ORDER == 2 else 1
    # Derivatives of rows take n in the derivative of their denominator alone, those of keys only of the first order.
    PLAIN: tl.constexpr = (NORMALIZE or ORDER == 0) if ROWS else ORDER < 2
    head = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    present = exists(mask, head, heads, i, positions, ROWS)
    part = block if CAUSAL else block * 0
    state = state_of(states, head, part, parts, 0, ORDERS, D, DV)
    state_dot = state_of(states, head, part, parts, ORDERS - 1, ORDERS, D, DV)
    r = tl.zeros((BLOCK,), FLOAT)
    rho = tl.zeros((BLOCK,), FLOAT)
    e = tl.zeros((BLOCK,), FLOAT)
    e_dot = tl.zeros((BLOCK,), FLOAT)
    for first_v in range(0, DV, BLOCK_V):
        v = first_v + tl.arange(0, BLOCK_V)
        # n and n. of rows, grad v and its dot of keys; the sums of weights d - eps and d..
        n = tl.zeros((BLOCK, BLOCK_V), FLOAT)
        n_dot = tl.zeros((BLOCK, BLOCK_V), FLOAT)
        d = tl.zeros((BLOCK,), FLOAT)
        d_dot = tl.zeros((BLOCK,), FLOAT)
        for first in range(0, D, K):
            c = first + tl.arange(0, K)
            f, f_dot = load_features(side, head, heads, i, c, present, D, MAP, ORDER, FLOAT)
            matrix = load_matrix(state, c, v, D, DV)
            if PLAIN:
                n = add_product(f, matrix, n)
            if ROWS and NORMALIZE:
                total = load_total(state, c, D, DV)[None, :]
                d += tl.sum(f * total, axis=1)
            if ORDER == 2:
                n_dot = add_product(f_dot, matrix, n_dot)
                n_dot = add_product(f, load_matrix(state_dot, c, v, D, DV), n_dot)
                if ROWS and NORMALIZE:
                    d_dot += tl.sum(f_dot * total + f * load_total(state_dot, c, D, DV)[None, :], axis=1)
        if CAUSAL:
            # Pairs within the block, some columns at a time.
            for start in range(block * BLOCK, min(block * BLOCK + BLOCK, positions), K):
                j = start + tl.arange(0, K)
                others = exists(mask, head, heads, j, positions, not ROWS)
                pairs = tl.zeros((BLOCK, K), FLOAT)
                pairs_dot = tl.zeros((BLOCK, K), FLOAT)
                for first in range(0, D, K):
                    c = first + tl.arange(0, K)
                    f, f_dot = load_features(side, head, heads, i, c, present, D, MAP, ORDER, FLOAT)
                    g, g_dot = load_features(other, head, heads, j, c, others, D, MAP, ORDER, FLOAT)
                    pairs = add_product(f, tl.trans(g), pairs)
                    if ORDER == 2:
                        pairs_dot = add_product(f_dot, tl.trans(g), pairs_dot)
                        pairs_dot = add_product(f, tl.trans(g_dot), pairs_dot)
                pairs = tl.where(sees(i, j, ROWS), pairs, 0.0)
                y, y_dot = load_values(other, scalars, head, heads, j, v, others, positions, DV, not ROWS, ORDER, FLOAT)
                if PLAIN:
                    n = add_product(pairs, y, n)
                d += tl.sum(pairs, axis=1)
                if ORDER == 2:
                    pairs_dot = tl.where(sees(i, j, ROWS), pairs_dot, 0.0)
                    n_dot = add_product(pairs_dot, y, n_dot)
                    n_dot = add_product(pairs, y_dot, n_dot)
                    d_dot += tl.sum(pairs_dot, axis=1)
        if ROWS:
            if NORMALIZE:
                r = reciprocal(d + tl.full((), eps, FLOAT))
                rho = r * d_dot
            else:
                r = reciprocal(tl.load(visible + (head // heads) * positions + i, mask=present, other=0.0))
            if ORDER == 0:
                store(out, head, heads, i, v, r[:, None] * n, positions, DV)
            else:
                w = r[:, None] * load(side.y, head, heads, i, v, present, DV, FLOAT)
                e -= tl.sum(w * n, axis=1)
                if ORDER == 2:
                    e_dot -= tl.sum(w * n_dot, axis=1)
                    store(out, head, heads, i, v, r[:, None] * (n_dot - rho[:, None] * n), positions, DV)
        else:
            if ORDER == 2:
                n = n_dot
            store(out, head, heads, i, v, tl.where(present[:, None], n, 0.0), positions, DV)
    if ROWS and ORDER > 0:
        e = r * e
        e_dot = r * e_dot - 2 * rho * e
        if not NORMALIZE:
            e = tl.zeros((BLOCK,), FLOAT)
            e_dot = tl.zeros((BLOCK,), FLOAT)
        tl.store(scalars_of(scalars, 0, head, positions) + i, r, mask=present)
        tl.store(scalars_of(scalars, 1, head, positions) + i, e, mask=present)
        tl.store(scalars_of(scalars, 2, head, positions) + i, rho, mask=present)
        tl.store(scalars_of(scalars, 3, head, positions) + i, e_dot, mask=present)


@triton.jit(do_not_specialize=["positions", "heads", "parts", "blocks"])
def apply_values(
    side,  # a Side
    other,  # the other Side
    mask,  # uint8 [B, positions] of keys, or None
    scalars,  # [B H, 4, positions] of the rows
    states,  # of the other side, scanned
    out,  # Array [B, H, positions, D], written: the gradient of x, or its dot
    positions,
    heads,
    parts,
    blocks,
    D: tl.constexpr,
    DV: tl.constexpr,
    MAP: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    FLOAT: tl.constexpr = states.dtype.element_ty
    ORDERS: tl.constexpr = 2 if ORDER == 2 else 1
    head = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    present = exists(mask, head, heads, i, positions, ROWS)
    part = block if CAUSAL else block * 0
    state = state_of(states, head, part, parts, 0, ORDERS, D, DV)
    state_dot = state_of(states, head, part, parts, ORDERS - 1, ORDERS, D, DV)
    grad = tl.zeros((BLOCK, BLOCK_D), FLOAT)
    grad_dot = tl.zeros((BLOCK, BLOCK_D), FLOAT)
    for first in range(0, DV, K):
        v = first + tl.arange(0, K)
        y, y_dot = load_values(side, scalars, head, heads, i, v, present, positions, DV, ROWS, ORDER, FLOAT)
        matrix = tl.trans(load_matrix(state, c, v, D, DV))
        grad = add_product(y, matrix, grad)
        if ORDER == 2:
            grad_dot = add_product(y_dot, matrix, grad_dot)
            grad_dot = add_product(y, tl.trans(load_matrix(state_dot, c, v, D, DV)), grad_dot)
    weight, weight_dot = load_weights(scalars, head, i, present, positions, ROWS, ORDER, FLOAT)
    total = load_total(state, c, D, DV)[None, :]
    grad += weight[:, None] * total
    if ORDER == 2:
        grad_dot += weight[:, None] * load_total(state_dot, c, D, DV)[None, :] + weight_dot[:, None] * total
    if CAUSAL:
        # Pairs within the block, some columns at a time.
        for start in range(block * BLOCK, min(block * BLOCK + BLOCK, positions), K):
            j = start + tl.arange(0, K)
            others = exists(mask, head, heads, j, positions, not ROWS)
            along, along_dot = load_weights(scalars, head, j, others, positions, not ROWS, ORDER, FLOAT)
            pairs = weight[:, None] * along[None, :]
            pairs_dot = weight_dot[:, None] * along[None, :] + weight[:, None] * along_dot[None, :]
            for first in range(0, DV, K):
                v = first + tl.arange(0, K)
                y, y_dot = load_values(side, scalars, head, heads, i, v, present, positions, DV, ROWS, ORDER, FLOAT)
                x, x_dot = load_values(other, scalars, head, heads, j, v, others, positions, DV, not ROWS, ORDER, FLOAT)
                pairs = add_product(y, tl.trans(x), pairs)
                if ORDER == 2:
                    pairs_dot = add_product(y_dot, tl.trans(x), pairs_dot)
                    pairs_dot = add_product(y, tl.trans(x_dot), pairs_dot)
            f, f_dot = load_features(other, head, heads, j, c, others, D, MAP, ORDER, FLOAT)
            pairs = tl.where(sees(i, j, ROWS), pairs, 0.0)
            grad = add_product(pairs, f, grad)
            if ORDER == 2:
                grad_dot = add_product(tl.where(sees(i, j, ROWS), pairs_dot, 0.0), f, grad_dot)
                grad_dot = add_product(pairs, f_dot, grad_dot)
    _, slope, curvature = feature_map(load(side.x, head, heads, i, c, present, D, FLOAT), MAP)
    result = slope * grad
    if ORDER == 2:
        result = curvature * load(side.u, head, heads, i, c, present, D, FLOAT) * grad + slope * grad_dot
    store(out, head, heads, i, c, tl.where(present[:, None], result, 0.0), positions, D)


def _array(x: torch.Tensor) -> Array:
    x = x if x.stride(3) == 1 else x.contiguous()
    return Array(x, *x.stride()[:3])


class _Problem:
    """The sizes and settings of one call, and its launches."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        feature_map: str,
        causal: bool,
        normalize: bool,
        mask: torch.Tensor | None,
        eps: float,
        order: int,
    ) -> None:
        batch, self.heads, rows, width = q.shape
        keys, value_width = v.shape[2:]
        self.device, self.eps, self.batch_heads = q.device, eps, batch * self.heads
        self.positions = {True: rows, False: keys}  # by ROWS
        self.causal, self.normalize, self.order = causal, normalize, order
        wide = q.dtype == torch.float64
        self.dtype = torch.float64 if wide else torch.float32
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        largest = 32 if wide else 64
        self.block, self.block_d, self.block_v = (
            min(largest, max(16, triton.next_power_of_2(size))) for size in (max(rows, keys), width, value_width)
        )
        self.tiles = triton.cdiv(width, self.block_d), triton.cdiv(value_width, self.block_v)
        self.options = {"D": width, "DV": value_width, "MAP": feature_map, "ORDER": order, "num_warps": _WARPS}
        self.span = self.block if causal else max(_SPAN, self.block)
        self.size = (2 if order == 2 else 1) * width * (value_width + 1)
        self.scalars = self._empty(self.batch_heads, 4, rows) if order else self._empty(1)
        self.visible = self.scalars if normalize else self._visible(batch, rows, keys)

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _visible(self, batch: int, rows: int, keys: int) -> torch.Tensor:
        """How many keys each row sees, [B, rows]."""
        if self.mask is None:
            counts = torch.arange(1, keys + 1, device=self.device).expand(batch, keys)
        else:
            counts = self.mask.cumsum(1)
        counts = counts if self.causal else counts[:, -1:].expand(batch, rows)
        return counts.to(self.dtype).contiguous()

    def parts(self, of_rows: bool) -> int:
        return triton.cdiv(self.positions[of_rows], self.span)

    def state(self, side: Side, of_rows: bool) -> torch.Tensor:
        """The scanned state of a side, [B H, parts, ORDERS, D (DV + 1)]."""
        parts, positions = self.parts(of_rows), self.positions[of_rows]
        states = self._empty(self.batch_heads, parts, self.size)
        sum_parts[(self.batch_heads * parts, *self.tiles)](
            side,
            self.mask,
            self.scalars,
            states,
            positions,
            self.heads,
            parts,
            self.span,
            ROWS=of_rows,
            BLOCK_D=self.block_d,
            BLOCK_V=self.block_v,
            **self.options,
        )
        if parts > 1 or self.causal:
            scan_parts[(self.batch_heads, triton.cdiv(self.size, 256))](
                states, parts, self.size, CAUSAL=self.causal, BACKWARD=of_rows, BLOCK=256
            )
        return states

    def apply_features(self, side: Side, other: Side, states: torch.Tensor, out: torch.Tensor, of_rows: bool) -> None:
        positions = self.positions[of_rows]
        blocks = triton.cdiv(positions, self.block)
        apply_features[(self.batch_heads * blocks,)](
            side,
            other,
            self.mask,
            self.scalars,
            states,
            self.visible,
            _array(out),
            self.eps,
            positions,
            self.heads,
            self.parts(not of_rows),
            blocks,
            ROWS=of_rows,
            CAUSAL=self.causal,
            NORMALIZE=self.normalize,
            BLOCK=self.block,
            BLOCK_V=self.block_v,
            **self.options,
        )

    def apply_values(self, side: Side, other: Side, states: torch.Tensor, out: torch.Tensor, of_rows: bool) -> None:
        positions = self.positions[of_rows]
        blocks = triton.cdiv(positions, self.block)
        apply_values[(self.batch_heads * blocks, self.tiles[0])](
            side,
            other,
            self.mask,
            self.scalars,
            states,
            _array(out),
            positions,
            self.heads,
            self.parts(not of_rows),
            blocks,
            ROWS=of_rows,
            CAUSAL=self.causal,
            BLOCK=self.block,
            BLOCK_D=self.block_d,
            **self.options,
        )

    def derivatives(
        self, rows: Side, keys: Side, of_grad: torch.Tensor, of_q: torch.Tensor, of_k: torch.Tensor, of_v: torch.Tensor
    ) -> None:
        """Of the order of the problem; ``of_grad`` is written in the second order."""
        of_keys = self.state(keys, False)
        self.apply_features(rows, keys, of_keys, of_grad, True)
        of_rows = self.state(rows, True)
        self.apply_values(rows, keys, of_keys, of_q, True)
        self.apply_values(keys, rows, of_rows, of_k, False)
        self.apply_features(keys, rows, of_rows, of_v, False)


def linear_attention(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *settings) -> None:
    """Fill out [B, H, Nq, Dv]. settings: feature map, causal, normalize, mask bool [B, Nk] or None, eps."""
    problem = _Problem(q, k, v, *settings, order=0)
    rows, keys = _array(q), Side(_array(k), _array(k), _array(v), _array(v))
    rows = Side(rows, rows, rows, rows)
    problem.apply_features(rows, keys, problem.state(keys, False), out, True)


def linear_attention_backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *settings,
) -> None:
    """Fill the gradients of q, k and v from that of the output; settings as of `linear_attention`."""
    rows, keys = (Side(x, x, y, y) for x, y in ((_array(q), _array(grad)), (_array(k), _array(v))))
    _Problem(q, k, v, *settings, order=1).derivatives(rows, keys, grad, grad_q, grad_k, grad_v)


def linear_attention_double_backward(
    of_grad: torch.Tensor,
    of_q: torch.Tensor,
    of_k: torch.Tensor,
    of_v: torch.Tensor,
    u_q: torch.Tensor,
    u_k: torch.Tensor,
    u_v: torch.Tensor,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *settings,
) -> None:
    """Fill the gradients of grad, q, k and v from those of the gradients; settings as of `linear_attention`."""
    g = _array(grad)
    rows, keys = Side(_array(q), _array(u_q), g, g), Side(_array(k), _array(u_k), _array(v), _array(u_v))
    _Problem(q, k, v, *settings, order=2).derivatives(rows, keys, of_grad, of_q, of_k, of_v)
