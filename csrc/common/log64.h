// Natural logarithm and exponential in float64 with proved errors, in units of u = 2^-53. Every operation is one IEEE
// operation, so that the bits do not depend on the vector width.
//
// No include guard, as philox.h; needs `f64`, `u64` (double and uint64_t, or vectors of equally many) and
// ROBATTR_INLINE, and must be compiled without contraction.

// ln x and 1/x for positive normal x. Relative error of the logarithm: at most 20 u; of the reciprocal: 5 u.
//
// x = 2^k z with z in [sqrt(1/2), sqrt(2)), s = (z - 1)/(z + 1), ln z = 2 s (1 + s^2/3 + ... + s^16/17 + ...).
// |s| <= 0.1716: the terms left out are below 8.1 u. z - 1 is exact, s is off by 5 u (one division serves both
// results), the sum and the last product by 3 u. If k = 0 that is all; else |ln z| and |k ln 2| / 2 are at most |ln x|,
// and k ln 2 (2 u) and the last addition (1 u) come on top.
ROBATTR_INLINE f64 log_and_reciprocal(f64 x, f64& reciprocal) {
  constexpr uint64_t kRootHalf = 0x3FE6A09E667F3BCD, kMantissa = 0x000FFFFFFFFFFFFF, kOne = 0x3FF0000000000000;
  const u64 shifted = (u64)x + (kOne - kRootHalf);
  const f64 k = (f64)((shifted >> 52) | 0x4330000000000000) - (0x1p52 + 1023);
  const f64 z = (f64)((shifted & kMantissa) + kRootHalf);
  const f64 next = z + 1.0;
  const f64 both = 1.0 / (z * next);
  reciprocal = (next * both) * (f64)(2 * kOne - (shifted & ~kMantissa));
  const f64 s = (z - 1.0) * (z * both);
  const f64 t = s * s;
  f64 p = t * (1.0 / 17) + 1.0 / 15;
  p = p * t + 1.0 / 13;
  p = p * t + 1.0 / 11;
  p = p * t + 1.0 / 9;
  p = p * t + 1.0 / 7;
  p = p * t + 1.0 / 5;
  p = p * t + 1.0 / 3;
  const f64 twice = s + s;
  return k * 0x1.62e42fefa39efp-1 + (twice + twice * (t * p));
}

// exp x for x in [-708, 709]. Relative error: at most 4 u.
//
// x = k ln 2 + r with |r| <= 0.3466; the Taylor polynomial of degree 13 leaves out less than 0.04 u. r is off by 0.6 u
// (k times the first part of ln 2 is exact), and Horner's last additions round 1 + r (...) in [0.7, 1.42] by 2 u.
ROBATTR_INLINE f64 exp64(f64 x) {
  const f64 rounded = x * 0x1.71547652b82fep+0 + 0x1.8p52;
  const f64 k = rounded - 0x1.8p52;
  const f64 r = (x - k * 0x1.62e42feep-1) - k * 0x1.a39ef35793c76p-33;
  f64 p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return (f64)((u64)p + ((u64)rounded << 52));
}
