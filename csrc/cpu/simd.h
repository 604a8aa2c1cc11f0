// Vectors of one register and the few operations that have no operator. Every lane of every width computes the same
// bits. Included by cpu/foreach_isa.h inside the namespace of one instruction set; no include guard.

#if ROBATTR_ISA == ROBATTR_ISA_AVX512
constexpr int kRegister = 64;
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

typedef float f32 __attribute__((vector_size(kRegister)));
typedef int32_t i32 __attribute__((vector_size(kRegister)));
typedef uint32_t u32 __attribute__((vector_size(kRegister)));
typedef uint64_t u64 __attribute__((vector_size(kRegister)));
typedef double f64 __attribute__((vector_size(kRegister)));

constexpr int kLanes = kRegister / 4;

ROBATTR_INLINE f32 load(const float* p) {
  f32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

ROBATTR_INLINE void store(float* p, f32 v) { std::memcpy(p, &v, sizeof v); }

ROBATTR_INLINE i32 bits_of(f32 v) { return (i32)v; }
ROBATTR_INLINE f32 float_from_bits(i32 v) { return (f32)v; }
ROBATTR_INLINE f32 to_float(i32 v) { return __builtin_convertvector(v, f32); }

ROBATTR_INLINE f32 square_root(f32 v) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  return (f32)_mm512_sqrt_ps((__m512)v);
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
  return (f32)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (f32)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// Products of the low halves of each lane.
ROBATTR_INLINE u64 multiply_low_halves(u64 a, u64 b) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  return (u64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
  return (u64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (u64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

// The low halves of even and odd lanes side by side: even[0], odd[0], even[1], ...
ROBATTR_INLINE u32 zip_low_halves(u64 even, u64 odd) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  return (u32)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA);
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
  return (u32)_mm256_blend_epi32((__m256i)even, _mm256_slli_epi64((__m256i)odd, 32), 0xAA);
#else
  return (u32)((even & 0xFFFFFFFF) | (odd << 32));
#endif
}
