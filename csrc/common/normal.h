// Two standard normals from two random words; definition and constants: robattr_fast/reference/noisy_samples.py.
//
// Every operation is one IEEE float32 operation: this must be compiled without contraction (-ffp-contract=off,
// --fmad=false). No include guard, as philox.h; needs `f32`, `i32`, `u32`, `bits_of`, `float_from_bits`, `to_float`,
// `square_root` and ROBATTR_INLINE.

ROBATTR_INLINE void box_muller(u32 radius_word, u32 phase_word, f32& z0, f32& z1) {
  // 2^31 times the uniform, in (0, 2^31]
  const f32 u = to_float((i32)(radius_word >> 1)) + 0.5f;
  const i32 bits = bits_of(u);
  const i32 exponent = (bits - 0x3F3504F3) >> 23;
  const f32 t = float_from_bits(bits - (exponent << 23)) - 1.0f;
  f32 p = t * -0.174008727f + 0.285349727f;
  p = p * t + -0.298295349f;
  p = p * t + 0.331551701f;
  p = p * t + -0.399261266f;
  p = p * t + 0.500026762f;
  p = p * t + -0.666678190f;
  p = t * (t * (t * p + 1.0f) - 2.0f);
  const f32 radius = square_root(to_float(31 - exponent) * 1.38629436f + p);

  // Odd multiples of 2^-23 quarter turns, in (-1, 1): 23 bits become the fraction of a float in [2, 4).
  const f32 turn = float_from_bits((i32)((phase_word >> 7 & 0x7FFFFFu) | 0x40000000u));
  const f32 y = (turn - 3.0f) + 0x1p-23f;
  const f32 y2 = y * y;
  f32 s = y2 * -3.59545069e-05f + 0.00249000709f;
  s = s * y2 + -0.0807454363f;
  s = s * y2 + 0.785398185f;
  s = y * s;
  f32 c = y2 * -0.000319160172f + 0.0158503978f;
  c = c * y2 + -0.308424503f;
  c = y2 * c + 1.0f;

  // The quadrant, bits 31 and 30, swaps sine and cosine (bit 30) and sets their signs.
  const auto odd = (i32)(phase_word << 1) < 0;
  const f32 first = odd ? s : c, second = odd ? c : s;
  const i32 first_sign = (i32)((phase_word + 0x40000000u) & 0x80000000u);
  const i32 second_sign = (i32)(phase_word & 0x80000000u);
  z0 = radius * float_from_bits(bits_of(first) ^ first_sign);
  z1 = radius * float_from_bits(bits_of(second) ^ second_sign);
}
