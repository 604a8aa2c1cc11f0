// Inner products of two blocks of packed rows in tiles of 4 x 4 rows. Compiled once per instruction set; no include
// guard.
//
// Each element type has: Operand, one step of a row made ready to multiply; Sum, the partial inner products of a pair;
// multiply_add; total.

constexpr int kTileRows = 4;

#if ROBATTR_ISA == ROBATTR_ISA_AVX512_COUNT

struct Bits {
  static constexpr int kStep = 64;
  using Operand = __m512i;
  using Sum = __m512i;
  ROBATTR_INLINE_MEMBER Sum zero() { return _mm512_setzero_si512(); }
  ROBATTR_INLINE_MEMBER Operand load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  ROBATTR_INLINE_MEMBER Sum multiply_add(Sum sum, Operand a, Operand b) {
    return _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_and_si512(a, b)));
  }
  ROBATTR_INLINE_MEMBER int64_t total(Sum sum) { return _mm512_reduce_add_epi64(sum); }
};

struct Nibbles {
  static constexpr int kStep = 64;
  struct Operand {
    __m512i low, high;
  };
  using Sum = __m512i;
  ROBATTR_INLINE_MEMBER Sum zero() { return _mm512_setzero_si512(); }
  ROBATTR_INLINE_MEMBER Operand load(const uint8_t* p) {
    const __m512i packed = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(packed, mask), _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask)};
  }
  ROBATTR_INLINE_MEMBER Sum multiply_add(Sum sum, Operand a, Operand b) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, a.low, b.low), a.high, b.high);
  }
  ROBATTR_INLINE_MEMBER int64_t total(Sum sum) { return _mm512_reduce_add_epi32(sum); }
};

#else

struct Bits {
  static constexpr int kStep = 8;
  using Operand = uint64_t;
  using Sum = int64_t;
  ROBATTR_INLINE_MEMBER Sum zero() { return 0; }
  ROBATTR_INLINE_MEMBER Operand load(const uint8_t* p) {
    uint64_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
  }
  ROBATTR_INLINE_MEMBER Sum multiply_add(Sum sum, Operand a, Operand b) { return sum + __builtin_popcountll(a & b); }
  ROBATTR_INLINE_MEMBER int64_t total(Sum sum) { return sum; }
};

#if ROBATTR_ISA == ROBATTR_ISA_BASELINE

struct Nibbles {
  static constexpr int kStep = 16;
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef uint16_t Words __attribute__((vector_size(16)));
  typedef uint32_t Sum __attribute__((vector_size(16)));
  // Levels widened to 16 bits: the four nibbles of each word.
  struct Operand {
    Words nibble[4];
  };
  ROBATTR_INLINE_MEMBER Sum zero() { return Sum{}; }
  ROBATTR_INLINE_MEMBER Operand load(const uint8_t* p) {
    Words packed;
    std::memcpy(&packed, p, sizeof packed);
    return {{packed & 15, (packed >> 4) & 15, (packed >> 8) & 15, packed >> 12}};
  }
  ROBATTR_INLINE_MEMBER Sum multiply_add(Sum sum, const Operand& a, const Operand& b) {
    Words product = {};
    for (int i = 0; i < 4; ++i) product += a.nibble[i] * b.nibble[i];
    return sum + ((Sum)product & 0xFFFFu) + ((Sum)product >> 16);
  }
  ROBATTR_INLINE_MEMBER int64_t total(Sum sum) { return int64_t{sum[0]} + sum[1] + sum[2] + sum[3]; }
};

#else  // AVX2, and AVX-512 without the counting instructions

struct Nibbles {
  static constexpr int kStep = 32;
  struct Operand {
    __m256i low, high;
  };
  using Sum = __m256i;
  ROBATTR_INLINE_MEMBER Sum zero() { return _mm256_setzero_si256(); }
  ROBATTR_INLINE_MEMBER Operand load(const uint8_t* p) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(packed, mask), _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask)};
  }
  ROBATTR_INLINE_MEMBER Sum multiply_add(Sum sum, Operand a, Operand b) {
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(a.low, b.low), _mm256_maddubs_epi16(a.high, b.high));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  ROBATTR_INLINE_MEMBER int64_t total(Sum sum) {
    alignas(32) int32_t lane[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), sum);
    int64_t all = 0;
    for (int32_t value : lane) all += value;
    return all;
  }
};

#endif
#endif

template <class Element, int kRowsA, int kRowsB>
static void gram_tile(const uint8_t* a, int64_t stride_a, const uint8_t* b, int64_t stride_b, int64_t bytes,
                      int64_t* out, int64_t stride_out) {
  typename Element::Sum sum[kRowsA][kRowsB];
  for (int i = 0; i < kRowsA; ++i) {
    for (int j = 0; j < kRowsB; ++j) sum[i][j] = Element::zero();
  }
  for (int64_t k = 0; k < bytes; k += Element::kStep) {
    typename Element::Operand left[kRowsA];
    for (int i = 0; i < kRowsA; ++i) left[i] = Element::load(a + i * stride_a + k);
    for (int j = 0; j < kRowsB; ++j) {
      const typename Element::Operand right = Element::load(b + j * stride_b + k);
      for (int i = 0; i < kRowsA; ++i) sum[i][j] = Element::multiply_add(sum[i][j], left[i], right);
    }
  }
  for (int i = 0; i < kRowsA; ++i) {
    for (int j = 0; j < kRowsB; ++j) out[i * stride_out + j] += Element::total(sum[i][j]);
  }
}

// out[i * stride_out + j] += <row i of a, row j of b>, over ``bytes`` bytes, a multiple of 64 and at most kChunk.
template <class Element>
static void gram_block(const uint8_t* a, int64_t stride_a, int64_t rows_a, const uint8_t* b, int64_t stride_b,
                       int64_t rows_b, int64_t bytes, int64_t* out, int64_t stride_out) {
  const int64_t full_a = rows_a - rows_a % kTileRows, full_b = rows_b - rows_b % kTileRows;
  for (int64_t i = 0; i < rows_a; i += i < full_a ? kTileRows : 1) {
    for (int64_t j = 0; j < rows_b; j += j < full_b ? kTileRows : 1) {
      const auto tile = i < full_a
                            ? (j < full_b ? gram_tile<Element, kTileRows, kTileRows> : gram_tile<Element, kTileRows, 1>)
                            : (j < full_b ? gram_tile<Element, 1, kTileRows> : gram_tile<Element, 1, 1>);
      tile(a + i * stride_a, stride_a, b + j * stride_b, stride_b, bytes, out + i * stride_out + j, stride_out);
    }
  }
}

static void gram_bits(const uint8_t* a, int64_t stride_a, int64_t rows_a, const uint8_t* b, int64_t stride_b,
                      int64_t rows_b, int64_t bytes, int64_t* out, int64_t stride_out) {
  gram_block<Bits>(a, stride_a, rows_a, b, stride_b, rows_b, bytes, out, stride_out);
}

static void gram_nibbles(const uint8_t* a, int64_t stride_a, int64_t rows_a, const uint8_t* b, int64_t stride_b,
                         int64_t rows_b, int64_t bytes, int64_t* out, int64_t stride_out) {
  gram_block<Nibbles>(a, stride_a, rows_a, b, stride_b, rows_b, bytes, out, stride_out);
}
