// Inner products of two blocks of packed rows. Compiled once per instruction set; no include guard.
//
// Tiles of 4 x 4 rows share their loads. Each element type has: Operand, one step of a row made ready to multiply; Sum,
// the partial inner products of a pair; multiply_add; total.

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

#elif ROBATTR_ISA == ROBATTR_ISA_BASELINE

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
#if defined(__SSE2__)
    for (int i = 0; i < 4; ++i) sum += (Sum)_mm_madd_epi16((__m128i)a.nibble[i], (__m128i)b.nibble[i]);
    return sum;
#else
    Words product = {};
    for (int i = 0; i < 4; ++i) product += a.nibble[i] * b.nibble[i];
    return sum + ((Sum)product & 0xFFFFu) + ((Sum)product >> 16);
#endif
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

#if ROBATTR_ISA == ROBATTR_ISA_AVX512_COUNT

static void gram_bits(const uint8_t* a, int64_t stride_a, int64_t rows_a, const uint8_t* b, int64_t stride_b,
                      int64_t rows_b, int64_t bytes, int64_t* out, int64_t stride_out) {
  gram_block<Bits>(a, stride_a, rows_a, b, stride_b, rows_b, bytes, out, stride_out);
}

#else

// Ones are counted by carry-save adders (Mula, Kurz, Lemire, Faster Population Counts Using AVX2 Instructions, Computer
// Journal 2018): of 16 vectors comes one whose ones stand for 16 each, and only that one is looked into.

ROBATTR_INLINE u64 load_bits(const uint8_t* p) {
  u64 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Adds a and b to the bits of sum; the carries.
ROBATTR_INLINE u64 carry_save_add(u64& sum, u64 a, u64 b) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  const u64 carry = (u64)_mm512_ternarylogic_epi64((__m512i)sum, (__m512i)a, (__m512i)b, 0xE8);
  sum = (u64)_mm512_ternarylogic_epi64((__m512i)sum, (__m512i)a, (__m512i)b, 0x96);
#else
  const u64 differ = sum ^ a, carry = (sum & a) | (differ & b);
  sum = differ ^ b;
#endif
  return carry;
}

// The ones in each byte.
ROBATTR_INLINE u64 ones_in_bytes(u64 v) {
  v -= (v >> 1) & 0x5555555555555555;
  v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333);
  return (v + (v >> 4)) & 0x0F0F0F0F0F0F0F0F;
}

// The sums of neighbouring bytes, 16 bits wide.
ROBATTR_INLINE u64 add_bytes(u64 v) { return (v & 0x00FF00FF00FF00FF) + ((v >> 8) & 0x00FF00FF00FF00FF); }

// Ones that two rows have in common; bytes is a multiple of 64 and at most kChunk.
static int64_t common_ones(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  constexpr int kGroup = 16;
  static_assert(kChunk / (kGroup * kRegister) * 8 <= 255 && (kGroup - 1) * 8 <= 255, "a byte of `sixteens` or `rest`");
  u64 ones = {}, twos = {}, fours = {}, eights = {}, sixteens = {}, rest = {};
  const auto both = [&](int64_t k) { return load_bits(a + k) & load_bits(b + k); };
  const auto add2 = [&](int64_t k) { return carry_save_add(ones, both(k), both(k + kRegister)); };
  const auto add4 = [&](int64_t k) { return carry_save_add(twos, add2(k), add2(k + 2 * kRegister)); };
  const auto add8 = [&](int64_t k) { return carry_save_add(fours, add4(k), add4(k + 4 * kRegister)); };
  const auto add16 = [&](int64_t k) { return carry_save_add(eights, add8(k), add8(k + 8 * kRegister)); };
  int64_t k = 0;
  for (; k + kGroup * kRegister <= bytes; k += kGroup * kRegister) sixteens += ones_in_bytes(add16(k));
  for (; k < bytes; k += kRegister) rest += ones_in_bytes(both(k));
  u64 total = add_bytes(sixteens) * 16 + add_bytes(ones_in_bytes(eights)) * 8 + add_bytes(ones_in_bytes(fours)) * 4 +
              add_bytes(ones_in_bytes(twos)) * 2 + add_bytes(ones_in_bytes(ones)) + add_bytes(rest);
  total += total >> 32;
  total += total >> 16;
  int64_t sum = 0;
  for (int lane = 0; lane < kRegister / 8; ++lane) sum += total[lane] & 0xFFFF;
  return sum;
}

static void gram_bits(const uint8_t* a, int64_t stride_a, int64_t rows_a, const uint8_t* b, int64_t stride_b,
                      int64_t rows_b, int64_t bytes, int64_t* out, int64_t stride_out) {
  for (int64_t i = 0; i < rows_a; ++i) {
    for (int64_t j = 0; j < rows_b; ++j) {
      out[i * stride_out + j] += common_ones(a + i * stride_a, b + j * stride_b, bytes);
    }
  }
}

#endif

static void gram_nibbles(const uint8_t* a, int64_t stride_a, int64_t rows_a, const uint8_t* b, int64_t stride_b,
                         int64_t rows_b, int64_t bytes, int64_t* out, int64_t stride_out) {
  gram_block<Nibbles>(a, stride_a, rows_a, b, stride_b, rows_b, bytes, out, stride_out);
}
