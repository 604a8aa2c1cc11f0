// Integer vectors of one register, comparisons to bit masks, and packing the lanes that a mask names. Included by
// cpu/select.h; no include guard.

template <class Key>
struct VectorOf {
  typedef Key type __attribute__((vector_size(kRegister)));
};
template <class Key>
using Vector = typename VectorOf<Key>::type;
template <class Key>
constexpr int kWidth = kRegister / sizeof(Key);

// The mask of the first `count` lanes, of all if there are fewer.
template <class Key>
ROBATTR_INLINE uint32_t first_lanes(int64_t count) {
  constexpr int kAll = kWidth<Key>;
  return (1u << (count < kAll ? count : kAll)) - 1;
}

// One 32-bit value for each lane of a Vector<Key>.
template <class Key>
struct CompanionOf {
  typedef uint32_t type __attribute__((vector_size(kRegister / sizeof(Key) * 4)));
};
template <class Key>
using Companion = typename CompanionOf<Key>::type;

template <class Key>
ROBATTR_INLINE Vector<Key> load_vector(const Key* p) {
  Vector<Key> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#if ROBATTR_ISA != ROBATTR_ISA_AVX512
// Bit i is set where lane i of `mask` (0 or -1 in each lane) is.
template <class Key>
ROBATTR_INLINE uint32_t mask_bits(Vector<Key> mask) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX2
  if constexpr (sizeof(Key) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#elif defined(__SSE2__)
  if constexpr (sizeof(Key) == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
  return static_cast<uint32_t>(_mm_movemask_pd((__m128d)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth<Key>; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}
#endif

template <class Key>
ROBATTR_INLINE uint32_t greater(Vector<Key> a, Vector<Key> b) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  if constexpr (sizeof(Key) == 4) return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b);
  return _mm512_cmpgt_epi64_mask((__m512i)a, (__m512i)b);
#else
  return mask_bits<Key>(a > b);
#endif
}

template <class Key>
ROBATTR_INLINE uint32_t equals(Vector<Key> a, Vector<Key> b) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  if constexpr (sizeof(Key) == 4) return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b);
  return _mm512_cmpeq_epi64_mask((__m512i)a, (__m512i)b);
#else
  return mask_bits<Key>(a == b);
#endif
}

ROBATTR_INLINE int count_bits(uint32_t mask) {
#if ROBATTR_ISA == ROBATTR_ISA_BASELINE && defined(__x86_64__)
  // Without the instruction gcc calls a function; these masks have at most four bits.
  return 0x4332322132212110 >> (4 * mask) & 15;
#else
  return __builtin_popcount(mask);
#endif
}

#if ROBATTR_ISA == ROBATTR_ISA_AVX2
// Byte j of entry m: which 32-bit lane goes to lane j when the lanes named by m are packed.
struct PackTable {
  uint64_t order[256];
  constexpr PackTable() : order() {
    for (int m = 0; m < 256; ++m) {
      int packed = 0;
      for (uint64_t lane = 0; lane < 8; ++lane) {
        if (m >> lane & 1) order[m] |= lane << (8 * packed++);
      }
    }
  }
};
static constexpr PackTable kPack;

ROBATTR_INLINE __m256i pack(__m256i v, uint32_t mask) {
  return _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(kPack.order[mask])));
}
#endif

// Stores the lanes of v that `mask` names one after another and returns how many. Other elements up to a whole vector
// from `out` on are overwritten.
template <class Key>
ROBATTR_INLINE int compress(Key* out, Vector<Key> v, uint32_t mask) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  if constexpr (sizeof(Key) == 4) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), (__m512i)v));
  } else {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(static_cast<__mmask8>(mask), (__m512i)v));
  }
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
  // Two 32-bit lanes for each of 64 bits.
  const uint32_t lanes = sizeof(Key) == 4 ? mask : _pdep_u32(mask, 0x55) * 3;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), pack((__m256i)v, lanes));
#else
  for (int i = 0; i < kWidth<Key>; ++i) {
    *out = v[i];
    out += mask >> i & 1;
  }
#endif
  return count_bits(mask);
}

template <class Key>
ROBATTR_INLINE Companion<Key> load_companion(const uint32_t* p) {
  Companion<Key> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// 0, 1, 2, ...
template <class Key>
ROBATTR_INLINE Companion<Key> companion_iota() {
  constexpr uint32_t first[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_companion<Key>(first);
}

// As compress, for the 32-bit values that go with the keys.
template <class Key>
ROBATTR_INLINE void compress_companion(uint32_t* out, Companion<Key> v, uint32_t mask) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  if constexpr (sizeof(Key) == 4) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), (__m512i)v));
  } else {
    const __m256i packed = _mm256_maskz_compress_epi32(static_cast<__mmask8>(mask), (__m256i)v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), packed);
  }
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
  if constexpr (sizeof(Key) == 4) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), pack((__m256i)v, mask));
  } else {
    const __m128i order = _mm_cvtepu8_epi32(_mm_cvtsi64_si128(kPack.order[mask]));
    _mm_storeu_ps(reinterpret_cast<float*>(out), _mm_permutevar_ps((__m128)v, order));
  }
#else
  for (int i = 0; i < kWidth<Key>; ++i) {
    *out = v[i];
    out += mask >> i & 1;
  }
#endif
}
