// Rows of a strided tensor to and from the cache, and the feature maps of kernel attention on them. Included inside the
// namespace of one instruction set (foreach_isa.h) after cpu/small_matmul.h; no include guard.

template <class F>
struct IntegersOf {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct IntegersOf<double> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};
template <class F>
using Integers = typename IntegersOf<F>::type;

// kWidth<F> elements as they are computed with, float for bfloat16 and half.
template <class T, class F>
ROBATTR_INLINE Vector<F> load_converted(const T* p) {
  if constexpr (std::is_same_v<T, F>) {
    return load_vector<F>(p);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    Half bits;
    std::memcpy(&bits, p, sizeof bits);
    return (Vector<F>)(__builtin_convertvector(bits, Integers<F>) << 16);
  } else {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
    return (Vector<F>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
    return (Vector<F>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vector<F> v;
    for (int i = 0; i < kWidth<F>; ++i) v[i] = static_cast<F>(p[i]);
    return v;
#endif
  }
}

template <class T, class F>
ROBATTR_INLINE void store_converted(T* p, Vector<F> v) {
  if constexpr (std::is_same_v<T, F>) {
    store_vector<F>(p, v);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    const auto bits = (Integers<F>)v;
    const auto rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest even
    const Half half = __builtin_convertvector(v == v ? rounded : Integers<F>{} + 0x7FC0, Half);
    std::memcpy(p, &half, sizeof half);
  } else {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kWidth<F>; ++i) p[i] = static_cast<T>(v[i]);
#endif
  }
}

// Rows [first, first + count) of width ``width``; zeros for rows that are not kept and for what pads the matrix.
template <class T, class F>
static void load_rows(const T* head, int64_t row_stride, int64_t first, int64_t count, int64_t width, const bool* keep,
                      Matrix<F> out) {
  for (int64_t r = 0; r < out.rows; ++r) {
    F* const to = out.row(r);
    if (r >= count || (keep != nullptr && !keep[first + r])) {
      std::memset(to, 0, out.columns * sizeof(F));
      continue;
    }
    const T* const from = head + (first + r) * row_stride;
    int64_t i = 0;
    for (; i + kWidth<F> <= width; i += kWidth<F>) store_vector<F>(to + i, load_converted<T, F>(from + i));
    for (; i < width; ++i) to[i] = static_cast<F>(from[i]);
    for (; i < out.columns; ++i) to[i] = 0;
  }
}

// Rows [first, first + count); zeros for rows that are not kept.
template <class T, class F>
static void store_rows(Matrix<F> in, int64_t first, int64_t count, int64_t width, const bool* keep, T* head,
                       int64_t row_stride) {
  for (int64_t r = 0; r < count; ++r) {
    const F* const from = in.row(r);
    T* const to = head + (first + r) * row_stride;
    if (keep != nullptr && !keep[first + r]) {
      std::memset(static_cast<void*>(to), 0, width * sizeof(T));
      continue;
    }
    int64_t i = 0;
    for (; i + kWidth<F> <= width; i += kWidth<F>) store_converted<T, F>(to + i, load_vector<F>(from + i));
    for (; i < width; ++i) to[i] = static_cast<T>(from[i]);
  }
}

// exp of x <= 0, to about an ulp; denormal results included. NaN stays.
ROBATTR_INLINE Vector<float> exp_of_negative(Vector<float> x) {
  using V = Vector<float>;
  const V zero = {};
  x = x < -104.0f ? zero - 104.0f : x;
  const V shift = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = x * 1.44269504f + shift;
  const auto n = (Integers<float>)shifted - (Integers<float>)shift;
  const V whole = shifted - shift;
  // ln 2 in two parts, of which the first times n is exact.
  V r = multiply_add(whole, zero - 0.693359375f, x);
  r = multiply_add(whole, zero + 2.12194440e-4f, r);
  // The Taylor polynomial: |r| <= ln(2)/2, so its error is below 6e-9.
  constexpr float kCoefficients[] = {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 1 / 2.f, 1.f, 1.f};
  V sum = zero + 1 / 5040.f;
  for (float c : kCoefficients) sum = multiply_add(sum, r, zero + c);
  // 2^n as two factors, so that denormals are rounded once.
  const auto half = n >> 1;
  return sum * (V)((half + 127) << 23) * (V)((n - half + 127) << 23);
}

ROBATTR_INLINE Vector<double> exp_of_negative(Vector<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// What is wanted of a feature map: phi alone, phi' too, phi'' too.
enum class Order { kValue, kSlope, kCurvature };

// x becomes phi(x), slope and curvature phi'(x) and phi''(x) where wanted, padding included.
template <class F, Order kOrder>
static void apply_feature_map(FeatureMap map, Matrix<F> x, Matrix<F> slope, Matrix<F> curvature) {
  using V = Vector<F>;
  const V zero = {}, one = zero + F(1);
  for (int64_t i = 0; i < x.rows * x.columns; i += kWidth<F>) {
    const V value = load_vector<F>(x.data + i);
    V phi = value, first = one, second = zero;
    const V positive = value < zero ? zero : value;  // NaN stays
    if (map == FeatureMap::kElu) {
      first = exp_of_negative(value > zero ? zero : value);
      phi = first + (value > zero ? value : zero);
      second = value > zero ? zero : first;
    } else if (map == FeatureMap::kRelu) {
      phi = positive;
      first = value > zero ? one : zero;
    } else if (map == FeatureMap::kSquaredRelu) {
      phi = positive * positive;
      first = positive + positive;
      second = value > zero ? one + one : zero;
    }
    store_vector<F>(x.data + i, phi);
    if constexpr (kOrder != Order::kValue) store_vector<F>(slope.data + i, first);
    if constexpr (kOrder == Order::kCurvature) store_vector<F>(curvature.data + i, second);
  }
}

// Zeros for rows that are not kept and for what pads the matrix, where a feature map has put phi(0).
template <class F>
static void clear_padding(int64_t first, int64_t count, int64_t width, const bool* keep, Matrix<F> x) {
  for (int64_t r = 0; r < x.rows; ++r) {
    const bool kept = r < count && (keep == nullptr || keep[first + r]);
    std::fill(x.row(r) + (kept ? width : 0), x.row(r) + x.columns, F(0));
  }
}
