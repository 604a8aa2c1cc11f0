// Comparisons to bit masks, and packing the lanes that a mask names. Included by cpu/select.h; no include guard.

typedef int64_t i64 __attribute__((vector_size(64)));

template <class Key>
struct VectorOf;
template <>
struct VectorOf<int32_t> {
  using type = i32;
};
template <>
struct VectorOf<int64_t> {
  using type = i64;
};
template <class Key>
using Vector = typename VectorOf<Key>::type;

template <class Key>
ROBATTR_INLINE Vector<Key> load_vector(const Key* p) {
  Vector<Key> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Bit i is set where lane i of a mask (0 or -1 in each lane) is.
ROBATTR_INLINE uint32_t mask_bits(i32 mask) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  return _mm512_movepi32_mask((__m512i)mask);
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
  __m256 half[2];
  std::memcpy(half, &mask, sizeof mask);
  return static_cast<uint32_t>(_mm256_movemask_ps(half[0]) | _mm256_movemask_ps(half[1]) << 8);
#elif defined(__SSE2__)
  __m128i quarter[4];
  std::memcpy(quarter, &mask, sizeof mask);
  return static_cast<uint32_t>(_mm_movemask_epi8(
      _mm_packs_epi16(_mm_packs_epi32(quarter[0], quarter[1]), _mm_packs_epi32(quarter[2], quarter[3]))));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}

ROBATTR_INLINE uint32_t mask_bits(i64 mask) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  return _mm512_movepi64_mask((__m512i)mask);
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
  __m256d half[2];
  std::memcpy(half, &mask, sizeof mask);
  return static_cast<uint32_t>(_mm256_movemask_pd(half[0]) | _mm256_movemask_pd(half[1]) << 4);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes / 2; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

template <class V>
ROBATTR_INLINE uint32_t greater(V a, V b) {
  return mask_bits(a > b);
}

template <class V>
ROBATTR_INLINE uint32_t equals(V a, V b) {
  return mask_bits(a == b);
}

// Stores the lanes of v that mask names one after another, and returns how many; up to 16 elements are overwritten.
ROBATTR_INLINE int compress(int32_t* out, i32 v, uint32_t mask) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), (__m512i)v));
#else
  int32_t lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) *out++ = lanes[__builtin_ctz(rest)];
#endif
  return __builtin_popcount(mask);
}

ROBATTR_INLINE int compress(int64_t* out, i64 v, uint32_t mask) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(static_cast<__mmask8>(mask), (__m512i)v));
#else
  int64_t lanes[kLanes / 2];
  std::memcpy(lanes, &v, sizeof v);
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) *out++ = lanes[__builtin_ctz(rest)];
#endif
  return __builtin_popcount(mask);
}

// The same for the indices first + i of the lanes, i < kWidth.
template <int kWidth>
ROBATTR_INLINE void compress_indices(uint32_t* out, uint32_t first, uint32_t mask) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  compress(reinterpret_cast<int32_t*>(out), (i32)iota(first), mask);
#else
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) *out++ = first + __builtin_ctz(rest);
#endif
}

// The same for kWidth elements of a list; out may lie in that list, not behind them.
template <int kWidth>
ROBATTR_INLINE void compress_list(uint32_t* out, const uint32_t* list, uint32_t mask) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  if constexpr (kWidth == kLanes) {
    compress(reinterpret_cast<int32_t*>(out), load_vector(reinterpret_cast<const int32_t*>(list)), mask);
  } else {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(list));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_maskz_compress_epi32(static_cast<__mmask8>(mask), v));
  }
#else
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) *out++ = list[__builtin_ctz(rest)];
#endif
}
