"""How often each element takes each level; definition: robattr_fast/reference/count_sparsified.py.

A program owns a block of elements of one image and goes through the samples: counts stay in registers and are added
to memory once. Atomics (of integers: any order gives the same sums) are used only where the samples, too, are split to
fill a device.
"""

import torch
import triton
import triton.language as tl

from robattr_fast.kernels._select import as_rows, quotient, support

# Enough programs to fill any device, and the fewest samples that are worth one.
_PROGRAMS, _LEAST_SAMPLES = 1024, 8
# Of one launch: axis 1 holds 65535 programs, and registers are too few to divide axis 0. What lies behind 2^15 images
# is as aligned as they are.
_IMAGES = 2**15


@triton.jit(do_not_specialize=["samples", "samples_per_program", "n"])
def count_levels(
    counts,  # int32 [B, n, LEVELS]
    scores,  # [B * samples, n], rows row_stride apart
    row_stride,
    least,  # [B * samples]
    g,  # [B * samples]
    packed,  # uint8 [B * samples, row_bytes] where PACK
    row_bytes,
    samples,
    samples_per_program,
    n,
    LEVELS: tl.constexpr,
    PADDED: tl.constexpr,  # LEVELS rounded up to a power of two
    PACK: tl.constexpr,
    SPLIT: tl.constexpr,  # other programs own other samples of the same elements
    BLOCK: tl.constexpr,
):
    # Axis 0 may hold 2^31 - 1 programs, the others only 65535.
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    first = tl.program_id(2) * samples_per_program
    step = tl.arange(0, PADDED)
    dtype: tl.constexpr = least.dtype.element_ty
    # Edge l of a row is g * fl(l / L). The padding has no samples above it.
    share = quotient(step.to(dtype), tl.full((PADDED,), LEVELS, dtype))
    reached = tl.zeros((PADDED, BLOCK), tl.int32)  # samples at level step + 1 or above
    for sample in range(first, min(first + samples_per_program, samples)):
        row = image * samples + sample
        bound = tl.load(least + row)
        edge = tl.where(step == 0, 0.0, tl.load(g + row) * share)
        edge = tl.where(step < LEVELS, edge, float("inf"))
        s = tl.load(scores + row * row_stride + i, mask=inside, other=0.0).to(dtype)
        is_above = ((s >= bound)[None, :] & (s[None, :] > edge[:, None])).to(tl.int32)
        reached += is_above
        if PACK:
            PER_BYTE: tl.constexpr = 8 if LEVELS == 1 else 2
            level = tl.where(inside, tl.sum(is_above, axis=0), 0)
            place = tl.arange(0, PER_BYTE) * (8 // PER_BYTE)
            byte = tl.sum(tl.reshape(level, (BLOCK // PER_BYTE, PER_BYTE)) << place[None, :], axis=1)
            at = tl.program_id(0) * (BLOCK // PER_BYTE) + tl.arange(0, BLOCK // PER_BYTE)
            tl.store(packed + row * row_bytes + at, byte.to(tl.uint8), mask=at < row_bytes)
    into = counts + (image * n + i) * LEVELS
    for level in tl.static_range(LEVELS):
        exactly = tl.where((step == level)[:, None], reached, 0) - tl.where((step == level + 1)[:, None], reached, 0)
        added = tl.sum(exactly, axis=0)
        if SPLIT:
            tl.atomic_add(into + level, added, mask=inside & (added != 0), sem="relaxed")
        else:
            tl.store(into + level, tl.load(into + level, mask=inside) + added, mask=inside)


def count_sparsified(
    counts: torch.Tensor, scores: torch.Tensor, k_tau: int, k_gamma: int, packed: torch.Tensor | None
) -> torch.Tensor:
    """counts int32 [B, n, L] += the levels of scores [B, q, n]; packed uint8 [B, q, row_bytes] is overwritten.

    Returns which samples are invalid, bool [B, q].
    """
    batch, samples, n = scores.shape
    levels = counts.shape[2]
    rows = as_rows(scores)
    least, g = support(rows, k_tau, k_gamma)
    block = 512
    row_bytes = 0 if packed is None else packed.shape[2]
    covered = n if packed is None else row_bytes * (8 if levels == 1 else 2)
    columns = triton.cdiv(covered, block)
    splits = min(triton.cdiv(_PROGRAMS, columns * batch), triton.cdiv(samples, _LEAST_SAMPLES))
    per_program = triton.cdiv(samples, splits)
    for first in range(0, batch, _IMAGES):
        images, of_images = slice(first, first + _IMAGES), slice(first * samples, (first + _IMAGES) * samples)
        count_levels[(columns, min(_IMAGES, batch - first), triton.cdiv(samples, per_program))](
            counts[images],
            rows[of_images],
            rows.stride(0),
            least[of_images],
            g[of_images],
            counts if packed is None else packed[images],
            row_bytes,
            samples,
            per_program,
            n,
            LEVELS=levels,
            PADDED=triton.next_power_of_2(levels),
            PACK=packed is not None,
            SPLIT=per_program < samples,
            BLOCK=block,
        )
    return least.isnan().view(batch, samples)
