"""x + sigma * z with z from the noise stream, version 1: the definition.

z depends on (seed, image id, sample index, element) alone. Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) turns a counter into four words, Box-Muller turns two words into two normals. Every float
operation below is one IEEE float32 operation, rounded by itself; a backend that contracts a multiply and an add, or
calls another logarithm, gives other bits.

The element e (C-contiguous index, whatever the memory format) reads word (e % 64) // 16 of block
(e // 64) * 16 + e % 16: a tile of 64 elements is 16 neighbouring blocks, four words each.
"""

from __future__ import annotations

import math

import torch

STREAM_VERSION = 1

_MASK = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

# All constants below are float32 numbers. Minimax fits on the intervals named; relative error under 3.2e-8.
_SQRT_HALF_BITS = 0x3F3504F3
_TWO_LN2 = 1.38629436
# -2 log(1 + t) = t (-2 + t (1 + t P(t))), 1 + t in [sqrt(1/2), sqrt(2))
_LOG = (-0.666678190, 0.500026762, -0.399261266, 0.331551701, -0.298295349, 0.285349727, -0.174008727)
# sin(pi/4 y) = y S(y^2), cos(pi/4 y) = 1 + y^2 C(y^2), y in (-1, 1)
_SIN = (0.785398185, -0.0807454363, 0.00249000709, -3.59545069e-05)
_COS = (-0.308424503, 0.0158503978, -0.000319160172)

_BLOCKS_PER_PASS = 1 << 18  # bounds the int64 temporaries to a few tens of MB


def philox4x32(counter: tuple[torch.Tensor, ...], key: int) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32: four int64 tensors of 32-bit words and a 64-bit key -> four such tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32
    for _ in range(10):
        # The 64-bit product wraps into the sign bit; the mask after the arithmetic shift undoes that.
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _MASK, (k1 + _PHILOX_KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _horner(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def box_muller(radius_word: torch.Tensor, phase_word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two words (int64 tensors holding 32-bit values) -> two independent standard normals, float32.

    The radius uses u = (w // 2 + 1/2) / 2^31 in (0, 1], so |z| <= 6.661; the phase is a quadrant (two bits) and an odd
    multiple of 2^-23 quarter turns inside it, symmetric about zero.
    """
    u = (radius_word >> 1).to(torch.float32) + 0.5  # 2^31 times the uniform
    bits = u.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    t = (bits - (exponent << 23)).view(torch.float32) - 1.0
    minus_two_log = (31 - exponent).to(torch.float32) * _TWO_LN2 + t * (t * (t * _horner(t, _LOG) + 1.0) - 2.0)
    # float32 torch.sqrt is not always correctly rounded (MKL); through float64 it is: the square root of a 24-bit
    # number lies further from any rounding boundary than a float64 error reaches.
    radius = torch.sqrt(minus_two_log.double()).to(torch.float32)

    quadrant = phase_word >> 30
    y = (((phase_word & 0x3FFFFFFF) >> 7) * 2 + (1 - (1 << 23))).to(torch.float32) * 2.0**-23
    y2 = y * y
    sine = y * _horner(y2, _SIN)
    cosine = y2 * _horner(y2, _COS) + 1.0
    odd = (quadrant & 1).bool()
    cosine, sine = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    cosine = torch.where(((quadrant + 1) & 2).bool(), -cosine, cosine)
    sine = torch.where((quadrant & 2).bool(), -sine, sine)
    return radius * cosine, radius * sine


def normals(n: int, *, seed: int, image_id: int, first_sample: int, num_samples: int, device=None) -> torch.Tensor:
    """The stream itself: float32 [num_samples, n] standard normals of one image."""
    tiles = math.ceil(n / 64)
    block = torch.arange(tiles * 16, device=device)
    sample = torch.arange(first_sample, first_sample + num_samples, device=device)[:, None]
    zero = torch.zeros((num_samples, tiles * 16), dtype=torch.int64, device=device)
    words = philox4x32((zero + block, zero + sample, zero + image_id, zero), seed)
    pairs = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
    # [samples, tile, word, lane] flattens to the element index.
    z = torch.stack([word.view(num_samples, tiles, 16) for word in pairs], dim=2)
    return z.reshape(num_samples, tiles * 64)[:, :n]


def noisy_samples(
    x: torch.Tensor,
    sigma: float,
    num_samples: int,
    *,
    seed: int = 0,
    first_sample: int = 0,
    image_ids: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> torch.Tensor:
    """x [B, *S] -> [B, num_samples, *S]: sample j of image b is x[b] + sigma * z(seed, image_ids[b], first_sample+j).

    float64 output is x + sigma * double(z) in double. Every other output type is computed in float32 with sigma rounded
    to float32, product and sum rounded separately, and rounded once more to the output type.
    ``channels_last`` changes strides only: each [num_samples, C, H, W] slice is then channels-last contiguous.
    """
    dtype = dtype or x.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    n = x[0].numel()
    flat = x.reshape(x.shape[0], n).to(compute)
    ids = range(x.shape[0]) if image_ids is None else image_ids.tolist()
    scale = torch.tensor(sigma, dtype=compute, device=x.device)
    out = torch.empty((x.shape[0], num_samples, n), dtype=dtype, device=x.device)
    chunk = max(1, _BLOCKS_PER_PASS * 4 // n)
    for b, image_id in enumerate(ids):
        for start in range(0, num_samples, chunk):
            count = min(chunk, num_samples - start)
            z = normals(
                n,
                seed=seed,
                image_id=image_id,
                first_sample=first_sample + start,
                num_samples=count,
                device=x.device,
            )
            out[b, start : start + count] = (flat[b] + scale * z.to(compute)).to(dtype)
    out = out.reshape(x.shape[0], num_samples, *x.shape[1:])
    return out.movedim(2, -1).contiguous().movedim(-1, 2) if channels_last else out
