"""The passes over rows and keys of which kernel attention and its derivatives are made; see linear_attention.py."""

import triton
import triton.language as tl

from robattr_fast.kernels._attention_tiles import (
    K,
    add_product,
    exists,
    feature_map,
    load,
    load_features,
    load_matrix,
    load_total,
    load_values,
    load_weights,
    paired,
    reciprocal,
    scalars_of,
    sees,
    state_of,
    store,
)


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
    # Tiles of one part follow each other: what one reads of features or values the others find in the cache.
    TILES_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    TILES_V: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    tile = tl.program_id(0) % (TILES_D * TILES_V)
    part = tl.program_id(0) // (TILES_D * TILES_V)
    head = part.to(tl.int64) // parts
    part = part % parts
    c = tile % TILES_D * BLOCK_D + tl.arange(0, BLOCK_D)
    v = tile // TILES_D * BLOCK_V + tl.arange(0, BLOCK_V)
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
    first_column = (c < D) & (tile // TILES_D == 0)
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


@triton.jit
def block_of(index, blocks, span, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """Of a block of all heads: the head, its first position, and the part whose state it needs."""
    begin = index % blocks * BLOCK
    part = begin // span if CAUSAL else begin * 0
    return index.to(tl.int64) // blocks, begin, part


@triton.jit(do_not_specialize=["positions", "heads", "parts", "span", "blocks"])
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
    span,  # positions of a part where CAUSAL, a multiple of BLOCK
    blocks,
    D: tl.constexpr,
    DV: tl.constexpr,
    MAP: tl.constexpr,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    FLOAT: tl.constexpr = states.dtype.element_ty
    ORDERS: tl.constexpr = 2 if ORDER == 2 else 1
    # Derivatives of rows take n in the derivative of their denominator alone, those of keys only of the first order.
    PLAIN: tl.constexpr = (NORMALIZE or ORDER == 0) if ROWS else ORDER < 2
    head, begin, part = block_of(tl.program_id(0), blocks, span, CAUSAL, BLOCK)
    i = begin + tl.arange(0, BLOCK)
    present = exists(mask, head, heads, i, positions, ROWS)
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
            # Pairs within the part, some columns at a time.
            first_j, end_j = paired(begin, part * span, span, positions, ROWS, BLOCK)
            for start in range(first_j, end_j, K):
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


@triton.jit(do_not_specialize=["positions", "heads", "parts", "span", "blocks"])
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
    span,  # positions of a part where CAUSAL, a multiple of BLOCK
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
    # Tiles of one block follow each other, and all but one find its values in the cache.
    TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    c = tl.program_id(0) % TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    head, begin, part = block_of(tl.program_id(0) // TILES, blocks, span, CAUSAL, BLOCK)
    i = begin + tl.arange(0, BLOCK)
    present = exists(mask, head, heads, i, positions, ROWS)
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
        # Pairs within the part, some columns at a time.
        first_j, end_j = paired(begin, part * span, span, positions, ROWS, BLOCK)
        for start in range(first_j, end_j, K):
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
