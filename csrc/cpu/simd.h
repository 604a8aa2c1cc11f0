// Sixteen lanes of 32 bits, the same source and the same bits at every instruction set; narrower hardware takes several
// registers. Included by cpu/foreach_isa.h inside the namespace of one instruction set; no include guard.

typedef float f32 __attribute__((vector_size(64)));
typedef int32_t i32 __attribute__((vector_size(64)));
typedef uint32_t u32 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));

constexpr int kLanes = 16;

ROBATTR_INLINE f32 load(const float* p) {
  f32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

ROBATTR_INLINE void store(float* p, f32 v) { std::memcpy(p, &v, sizeof v); }

ROBATTR_INLINE i32 bits_of(f32 v) { return (i32)v; }
ROBATTR_INLINE f32 float_from_bits(i32 v) { return (f32)v; }
ROBATTR_INLINE f32 to_float(i32 v) { return __builtin_convertvector(v, f32); }

ROBATTR_INLINE u32 iota(uint32_t first) { return u32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + first; }

ROBATTR_INLINE f32 square_root(f32 v) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  return (f32)_mm512_sqrt_ps((__m512)v);
#else
  f32 r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(v[i]);
  return r;
#endif
}

// Products of the low 32 bits of each 64-bit lane.
ROBATTR_INLINE u64x8 multiply_even(u64x8 a, uint32_t m) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  return (u64x8)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
  __m256i half[2];
  std::memcpy(half, &a, sizeof a);
  for (__m256i& h : half) h = _mm256_mul_epu32(h, _mm256_set1_epi64x(m));
  std::memcpy(&a, half, sizeof a);
  return a;
#elif defined(__SSE2__)
  __m128i quarter[4];
  std::memcpy(quarter, &a, sizeof a);
  for (__m128i& q : quarter) q = _mm_mul_epu32(q, _mm_set1_epi64x(m));
  std::memcpy(&a, quarter, sizeof a);
  return a;
#else
  return (a & 0xFFFFFFFFull) * m;
#endif
}

ROBATTR_INLINE void multiply_wide(u32 a, uint32_t m, u32& high, u32& low) {
  const u64x8 even = multiply_even((u64x8)a, m);
  const u64x8 odd = multiply_even((u64x8)a >> 32, m);
  high = (u32)((even >> 32) | (odd & 0xFFFFFFFF00000000ull));
  low = (u32)((even & 0xFFFFFFFFull) | (odd << 32));
}
