"""Noise, forward and input gradient of a small perceptron; definition: robattr_fast/reference/mlp_smoothgrad.py.

One program takes ROWS samples of one image from their noise, made in registers, to the sizes of their gradients: a
product with the first weights forward, one back, and between them layers small enough to stay on the chip. What a
layer gives is the left operand of the next product, of which one holds a slice of K columns at a time: it goes through
a few rows of memory that only this program uses. Selection and counting are those of `count_sparsified`.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from robattr_fast.kernels._attention_tiles import K, add_product
from robattr_fast.kernels._select import quotient
from robattr_fast.kernels._stream import INTERPRETED, box_muller, philox4x32

# From 64 rows on Triton 3.7 gives float32 products to the tensor cores of sm_100 as tf32.
ROWS = 32
COLUMNS = 128
WARPS = 8
STAGES = 2


@triton.jit
def _exp(x):
    return tl.exp(x) if INTERPRETED else libdevice.exp(x)


@triton.jit
def _logistic(x):
    return quotient(tl.full(x.shape, 1.0, x.dtype), 1.0 + _exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """phi(x). NaN stays NaN."""
    if ACTIVATION == "relu":
        y = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "tanh":
        y = 2.0 * _logistic(2.0 * x) - 1.0 if INTERPRETED else libdevice.tanh(x)
    elif ACTIVATION == "gelu":
        y = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        y = x * _logistic(x)
    elif ACTIVATION == "softplus":
        y = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)) if INTERPRETED else libdevice.log1p(_exp(x)))
    else:
        y = tl.where(x > 0, x, tl.exp(x) - 1.0 if INTERPRETED else libdevice.expm1(x))
    return y


@triton.jit
def times_slope(grad, x, ACTIVATION: tl.constexpr):
    """grad phi'(x), with torch's derivative at a kink."""
    if ACTIVATION == "relu":
        product = tl.where(x <= 0, 0.0, grad)
    elif ACTIVATION == "tanh":
        y = activate(x, ACTIVATION)
        product = grad * (1.0 - y * y)
    elif ACTIVATION == "gelu":
        density = _exp(x * x * -0.5) * 0.3989422804014327
        product = grad * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density)
    elif ACTIVATION == "silu":
        share = _logistic(x)
        product = grad * (share * (1.0 + x * (1.0 - share)))
    elif ACTIVATION == "softplus":
        product = tl.where(x > 20.0, grad, grad * _logistic(x))
    else:
        product = tl.where(x > 0, grad, grad * _exp(x))
    return product


@triton.jit
def _exchange(exchange, row, column, value, WIDTH: tl.constexpr):
    """Store a tile where every thread of the program can read it."""
    tl.debug_barrier()  # until all have read what lay there
    tl.store(exchange + row[:, None] * WIDTH + column[None, :], value)
    tl.debug_barrier()


@triton.jit
def _product(
    exchange,
    row,
    weight,
    inner_stride,
    column_stride,
    column,
    columns,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[ROWS, INNER] of the exchange times the matrix [INNER, columns] that has these strides, at BLOCK columns."""
    inside = column < columns
    result = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, INNER, K):
        i = first + tl.arange(0, K)
        x = tl.load(exchange + row[:, None] * WIDTH + i[None, :], mask=(i < INNER)[None, :], other=0.0)
        w = weight + i[:, None] * inner_stride + column[None, :] * column_stride
        result = add_product(x, tl.load(w, mask=(i < INNER)[:, None] & inside[None, :], other=0.0), result)
    return result


@triton.jit
def _add_bias(sums, bias, column, columns):
    return sums + tl.load(bias + column, mask=column < columns, other=0.0)[None, :]


@triton.jit
def _add_word(sums, x_row, first, z, sigma, weight, column, n, outputs, WORD: tl.constexpr):
    """sums + (x + sigma z) W' for the 16 elements of a tile that one word of the blocks makes."""
    e = first + WORD * 16 + tl.arange(0, 16)
    inside = e < n
    noisy = tl.load(x_row + e, mask=inside, other=0.0)[None, :] + sigma * z
    noisy = tl.where(inside[None, :], noisy, 0.0)
    w = weight + column[None, :] * n + e[:, None]
    return add_product(noisy, tl.load(w, mask=inside[:, None] & (column < outputs)[None, :], other=0.0), sums)


# Triton would make constants of arguments that equal 1, and constants have no types to convert.
@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_sample", "samples"])
def noisy_gradients(
    x,  # [B, n]
    weight1,  # [WIDTH1, n], and so on; those of layers past LAYERS are not read
    bias1,
    weight2,
    bias2,
    weight3,
    bias3,
    target,  # int64 [B] where TARGETED
    image_ids,  # int64 [B]
    scores,  # [B * samples, n]
    classes,  # int64 [B * samples]: of the largest logit
    exchange,  # float32 [programs, ROWS, WIDTH]
    sigma: tl.float64,
    seed_low,
    seed_high,
    first_sample,
    sample_offset,  # int64 [B] where OFFSET, added to first_sample: a captured graph is replayed for other samples
    samples,
    n,
    LAYERS: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    WIDTH3: tl.constexpr,
    BLOCK1: tl.constexpr,  # the width rounded up to a power of two, at least 16
    BLOCK2: tl.constexpr,
    BLOCK3: tl.constexpr,
    WIDTH: tl.constexpr,  # the largest block
    ACTIVATION: tl.constexpr,
    TARGETED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Axis 0 may hold 2^31 - 1 programs, axis 1 only 65535.
    per_image = tl.cdiv(samples, ROWS)
    image = tl.program_id(0) // per_image
    row = tl.arange(0, ROWS)
    number = (tl.program_id(0) % per_image) * ROWS + row
    sample = first_sample + number
    if OFFSET:
        sample += tl.load(sample_offset + image)
    exchange += tl.program_id(0).to(tl.int64) * (ROWS * WIDTH)

    lane = tl.arange(0, 16)
    column1 = tl.arange(0, BLOCK1)
    image_id = tl.load(image_ids + image).to(tl.uint32)
    scale = tl.full((1, 1), sigma, tl.float64).to(tl.float32)
    x_row = x + image.to(tl.int64) * n
    sums1 = tl.zeros((ROWS, BLOCK1), tl.float32)
    for tile in range(tl.cdiv(n, 64)):
        block = tl.broadcast_to((tile * 16 + lane)[None, :], (ROWS, 16)).to(tl.uint32)
        w0, w1, w2, w3 = philox4x32(
            block, sample.to(tl.uint32)[:, None], image_id, seed_low.to(tl.uint32), seed_high.to(tl.uint32)
        )
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
        first = tile * 64
        sums1 = _add_word(sums1, x_row, first, z0, scale, weight1, column1, n, WIDTH1, 0)
        sums1 = _add_word(sums1, x_row, first, z1, scale, weight1, column1, n, WIDTH1, 1)
        sums1 = _add_word(sums1, x_row, first, z2, scale, weight1, column1, n, WIDTH1, 2)
        sums1 = _add_word(sums1, x_row, first, z3, scale, weight1, column1, n, WIDTH1, 3)
    sums1 = _add_bias(sums1, bias1, column1, WIDTH1)

    CLASSES: tl.constexpr = WIDTH1 if LAYERS == 1 else (WIDTH2 if LAYERS == 2 else WIDTH3)
    BLOCK: tl.constexpr = BLOCK1 if LAYERS == 1 else (BLOCK2 if LAYERS == 2 else BLOCK3)
    logits = sums1
    if LAYERS > 1:
        column2 = tl.arange(0, BLOCK2)
        _exchange(exchange, row, column1, activate(sums1, ACTIVATION), WIDTH)
        sums2 = _product(exchange, row, weight2, 1, WIDTH1, column2, WIDTH2, WIDTH1, ROWS, WIDTH, BLOCK2)
        sums2 = _add_bias(sums2, bias2, column2, WIDTH2)
        logits = sums2
    if LAYERS > 2:
        column3 = tl.arange(0, BLOCK3)
        _exchange(exchange, row, column2, activate(sums2, ACTIVATION), WIDTH)
        sums3 = _product(exchange, row, weight3, 1, WIDTH2, column3, WIDTH3, WIDTH2, ROWS, WIDTH, BLOCK3)
        logits = _add_bias(sums3, bias3, column3, WIDTH3)

    is_class = (tl.arange(0, BLOCK) < CLASSES)[None, :]
    valid = tl.sum((is_class & ~(tl.abs(logits) < float("inf"))).to(tl.int32), axis=1) == 0
    # Of NaN nothing is the largest.
    largest = tl.minimum(tl.argmax(tl.where(is_class, logits, float("-inf")), axis=1), CLASSES - 1)
    exists = number < samples
    out = image.to(tl.int64) * samples + number
    tl.store(classes + out, largest.to(tl.int64), mask=exists)
    explained = largest
    if TARGETED:
        explained = tl.zeros_like(largest) + tl.load(target + image).to(tl.int32)

    if LAYERS == 2:
        grad = tl.load(weight2 + explained[:, None] * WIDTH1 + column1[None, :], mask=(column1 < WIDTH1)[None, :])
        _exchange(exchange, row, column1, times_slope(grad, sums1, ACTIVATION), WIDTH)
    if LAYERS == 3:
        grad = tl.load(weight3 + explained[:, None] * WIDTH2 + column2[None, :], mask=(column2 < WIDTH2)[None, :])
        _exchange(exchange, row, column2, times_slope(grad, sums2, ACTIVATION), WIDTH)
        grad = _product(exchange, row, weight2, WIDTH1, 1, column1, WIDTH1, WIDTH2, ROWS, WIDTH, BLOCK1)
        _exchange(exchange, row, column1, times_slope(grad, sums1, ACTIVATION), WIDTH)
    for first in range(0, n, COLUMNS):
        e = first + tl.arange(0, COLUMNS)
        if LAYERS == 1:
            gradient = tl.load(weight1 + explained[:, None] * n + e[None, :], mask=(e < n)[None, :])
        else:
            gradient = _product(exchange, row, weight1, n, 1, e, n, WIDTH1, ROWS, WIDTH, COLUMNS)
        size = tl.where(valid[:, None], tl.abs(gradient), float("nan"))
        tl.store(scores + out[:, None] * n + e[None, :], size, mask=exists[:, None] & (e < n)[None, :])


def gradient_sizes(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    activation: str,
    sigma: float,
    num_samples: int,
    seed: int,
    first_sample: int,
    image_ids: torch.Tensor,
    sample_offset: torch.Tensor | None,
    target: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [B, q, n], NaN where a logit is not finite, and classes int64 [B, q] of x [B, n], all float32.

    seed: int64 in two's complement.
    """
    batch, n = x.shape
    widths = [len(weight) for weight in weights]
    blocks = [max(16, triton.next_power_of_2(width)) for width in widths]
    programs = batch * triton.cdiv(num_samples, ROWS)
    exchange = x.new_empty((programs, ROWS, max(blocks)) if len(weights) > 1 else 1)
    scores = x.new_empty((batch, num_samples, n))
    classes = torch.empty((batch, num_samples), dtype=torch.int64, device=x.device)
    missing = 3 - len(weights)
    tensors = [tensor for layer in zip(weights, biases, strict=True) for tensor in layer] + [x, x] * missing
    width1, width2, width3 = widths + [1] * missing
    block1, block2, block3 = blocks + [16] * missing
    noisy_gradients[(programs,)](
        x,
        *tensors,
        image_ids if target is None else target,
        image_ids,
        scores,
        classes,
        exchange,
        sigma,
        seed & 0xFFFFFFFF,
        (seed >> 32) & 0xFFFFFFFF,
        first_sample,
        image_ids if sample_offset is None else sample_offset.expand_as(image_ids).contiguous(),
        num_samples,
        n,
        LAYERS=len(weights),
        WIDTH1=width1,
        WIDTH2=width2,
        WIDTH3=width3,
        BLOCK1=block1,
        BLOCK2=block2,
        BLOCK3=block3,
        WIDTH=max(blocks),
        ACTIVATION=activation,
        TARGETED=target is not None,
        OFFSET=sample_offset is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
        num_stages=STAGES,
        enable_fp_fusion=False,
    )
    return scores, classes
