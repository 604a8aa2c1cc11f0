"""x + sigma * z for many samples; definition: robattr_fast/reference/noisy_samples.py.

One program makes BLOCKS Philox blocks of one sample of one image: four normals each, at elements
tile * 64 + word * 16 + lane for block = tile * 16 + lane. Sixteen neighbouring lanes store 64 bytes of float32.
"""

import torch
import triton
import triton.language as tl

from robattr_fast.kernels._rounding import rounded
from robattr_fast.kernels._stream import box_muller, box_muller_fast, philox4x32


@triton.jit
def _store(x_row, out_row, e, z, n, plane, channels, sigma, CHANNELS_LAST: tl.constexpr, DOUBLE: tl.constexpr):
    """out[e] = x[e] + sigma * z, in float64 where the output is, else in float32 and rounded once more."""
    inside = e < n
    x = tl.load(x_row + e, mask=inside, other=0.0)
    if DOUBLE:
        value = x.to(tl.float64) + sigma * z.to(tl.float64)
    else:
        value = x.to(tl.float32) + sigma.to(tl.float32) * z
    if CHANNELS_LAST:
        e = (e % plane) * channels + e // plane
    tl.store(out_row + e, rounded(value, out_row.dtype.element_ty), mask=inside)


# Triton would make constants of arguments that equal 1, and constants have no types to convert.
@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_sample", "num_samples"])
def _noisy_samples(
    x,  # [B, n]
    out,  # [B, q, n], or [B, q, plane, channels] where CHANNELS_LAST
    image_ids,  # int64 [B]
    sigma: tl.float64,
    seed_low,
    seed_high,
    first_sample,
    sample_offset,  # int64 [B] where OFFSET, added to first_sample: a captured graph is replayed for other samples
    num_samples,
    n,
    plane,
    channels,
    CHANNELS_LAST: tl.constexpr,
    DOUBLE: tl.constexpr,
    OFFSET: tl.constexpr,
    FAST: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # Axis 0 may hold 2^31 - 1 programs, axis 1 only 65535.
    image = tl.program_id(0) // num_samples
    sample = first_sample + tl.program_id(0) % num_samples
    if OFFSET:
        sample += tl.load(sample_offset + image)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    image_id = tl.load(image_ids + image).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(
        block.to(tl.uint32),
        sample.to(tl.uint32),
        image_id,
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
    )
    scale = tl.full((1,), sigma, tl.float64)
    if FAST:
        z0, z1 = box_muller_fast(w0, w1)
        z2, z3 = box_muller_fast(w2, w3)
    else:
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
    x_row = x + image.to(tl.int64) * n
    out_row = out + tl.program_id(0).to(tl.int64) * n
    e = (block // 16) * 64 + block % 16
    _store(x_row, out_row, e, z0, n, plane, channels, scale, CHANNELS_LAST, DOUBLE)
    _store(x_row, out_row, e + 16, z1, n, plane, channels, scale, CHANNELS_LAST, DOUBLE)
    _store(x_row, out_row, e + 32, z2, n, plane, channels, scale, CHANNELS_LAST, DOUBLE)
    _store(x_row, out_row, e + 48, z3, n, plane, channels, scale, CHANNELS_LAST, DOUBLE)


def noisy_samples(
    x: torch.Tensor,
    out: torch.Tensor,
    sigma: float,
    seed: int,
    first_sample: int,
    image_ids: torch.Tensor,
    sample_offset: torch.Tensor | None,
    fast: bool,
) -> None:
    """Fill out [B, q, *S] (contiguous, or channels-last per sample) from x [B, *S]. seed: int64 in two's complement.

    fast: hardware functions, whose bits nobody promises.
    """
    x = x.contiguous()
    batch, num_samples = out.shape[:2]
    n = x[0].numel()
    channels_last = not out.is_contiguous()
    channels = out.shape[2] if channels_last else 1
    # Four blocks per thread: more share the rounds' constants, but an image of few elements would leave threads idle.
    blocks = min(512, triton.next_power_of_2(triton.cdiv(n, 64) * 16))
    grid = (batch * num_samples, triton.cdiv(triton.cdiv(n, 64) * 16, blocks))
    _noisy_samples[grid](
        x,
        out,
        image_ids,
        sigma,
        seed & 0xFFFFFFFF,
        (seed >> 32) & 0xFFFFFFFF,
        first_sample,
        image_ids if sample_offset is None else sample_offset.expand_as(image_ids).contiguous(),
        num_samples,
        n,
        n // channels,
        channels,
        CHANNELS_LAST=channels_last,
        DOUBLE=out.dtype == torch.float64,
        OFFSET=sample_offset is not None,
        FAST=fast,
        BLOCKS=blocks,
        enable_fp_fusion=fast,
    )
