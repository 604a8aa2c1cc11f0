"""The noise stream, version 1, as Triton functions; the definition is robattr_fast/reference/noisy_samples.py.

Compile with enable_fp_fusion=False: a contracted multiply-add gives other bits. `box_muller_fast` alone promises none.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# The interpreter has none of the device's functions.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def philox4x32(block, sample, image, seed_low, seed_high):
    """Ten rounds of Philox4x32 on uint32 counters (block, sample, image, 0): four uint32 words each."""
    c0 = block
    c1 = tl.zeros_like(block) + sample
    c2 = tl.zeros_like(block) + image
    c3 = tl.zeros_like(block)
    k0 = seed_low
    k1 = seed_high
    for _ in tl.static_range(10):
        m0 = tl.full(block.shape, 0xD2511F53, tl.uint32)
        m1 = tl.full(block.shape, 0xCD9E8D57, tl.uint32)
        high0 = tl.umulhi(c0, m0)
        low0 = c0 * m0
        high1 = tl.umulhi(c2, m1)
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(radius_word, phase_word):
    """Two words -> two independent standard normals, one IEEE float32 operation at a time."""
    u = (radius_word >> 1).to(tl.int32).to(tl.float32) + 0.5
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = t * -0.174008727 + 0.285349727
    p = p * t + -0.298295349
    p = p * t + 0.331551701
    p = p * t + -0.399261266
    p = p * t + 0.500026762
    p = p * t + -0.666678190
    p = t * (t * (t * p + 1.0) - 2.0)
    radius = tl.sqrt_rn((31 - exponent).to(tl.float32) * 1.38629436 + p)

    y = ((((phase_word & 0x3FFFFFFF) >> 7) * 2).to(tl.int32) - 0x7FFFFF).to(tl.float32) * 1.1920928955078125e-07
    y2 = y * y
    s = y2 * -3.59545069e-05 + 0.00249000709
    s = s * y2 + -0.0807454363
    s = s * y2 + 0.785398185
    s = y * s
    c = y2 * -0.000319160172 + 0.0158503978
    c = c * y2 + -0.308424503
    c = y2 * c + 1.0

    quadrant = phase_word >> 30
    odd = (quadrant & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit
def box_muller_fast(radius_word, phase_word):
    """Nearly the normals of `box_muller`, by the hardware's logarithm, square root, sine and cosine."""
    u = ((radius_word >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10
    # The first quadrant begins at -pi/4; 2 pi / 2^32.
    angle = (phase_word - 0x20000000).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    if INTERPRETED:
        log, sine, cosine = tl.log(u), tl.sin(angle), tl.cos(angle)
    else:
        log, sine, cosine = libdevice.fast_logf(u), libdevice.fast_sinf(angle), libdevice.fast_cosf(angle)
    # An approximate logarithm of almost 1 may be positive.
    radius = tl.sqrt(tl.maximum(-2.0 * log, 0.0))
    return radius * cosine, radius * sine
