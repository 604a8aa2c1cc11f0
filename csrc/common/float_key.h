// Floats as integers in the same order: -inf < ... < -0 = 0 < ... < inf < NaN, whatever the NaN's sign and payload.
//
// Of positive floats the key is the bit pattern, so that key + 1 is the next float. Works on int32_t (float) and
// int64_t (double), and on vectors of them. No include guard, as philox.h; needs ROBATTR_INLINE.

template <class Key>
struct FloatBits;

template <>
struct FloatBits<int32_t> {
  using Float = float;
  static constexpr int32_t kInfinity = 0x7F800000, kNaN = INT32_MAX;
  static constexpr int kSign = 31;
};

template <>
struct FloatBits<int64_t> {
  using Float = double;
  static constexpr int64_t kInfinity = 0x7FF0000000000000, kNaN = INT64_MAX;
  static constexpr int kSign = 63;
};

// V is Key or a vector of Key.
template <class Key, class V>
ROBATTR_INLINE V float_key(V bits) {
  using B = FloatBits<Key>;
  const V sign = bits >> B::kSign;
  const V magnitude = bits & B::kNaN;
  const V nan = (B::kInfinity - magnitude) >> B::kSign;
  return (((magnitude ^ sign) - sign) & ~nan) | (nan & B::kNaN);
}

// Negative where the float is NaN or infinite.
template <class Key, class V>
ROBATTR_INLINE V nonfinite_sign(V bits) {
  return (FloatBits<Key>::kInfinity - 1) - (bits & FloatBits<Key>::kNaN);
}

// The bits of the float whose key this is; of a NaN's key a quiet NaN.
template <class Key>
ROBATTR_INLINE Key float_bits(Key key) {
  if (key == FloatBits<Key>::kNaN) return FloatBits<Key>::kInfinity | (FloatBits<Key>::kInfinity >> 1);
  return key < 0 ? -key | (Key{1} << FloatBits<Key>::kSign) : key;
}
