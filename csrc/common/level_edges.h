// The edges between the levels of a sparsified map. No include guard, as philox.h; needs float_key.h, <cstring>.

// The key of g * (step / levels), both operations rounded; g is the key of a float >= 0.
template <class Key>
ROBATTR_INLINE Key level_edge(Key g, int step, int levels) {
  using Float = typename FloatBits<Key>::Float;
  Float value;
  memcpy(&value, &g, sizeof value);
  const Float edge = value * (static_cast<Float>(step) / static_cast<Float>(levels));
  Key key;
  memcpy(&key, &edge, sizeof key);
  return key;
}
