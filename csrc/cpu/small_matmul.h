// Products and transposes of small row-major matrices that lie in the cache, in float or double. All sizes are
// multiples of 16, rows are ``pitch`` elements apart. Included inside the namespace of one instruction set
// (foreach_isa.h) after cpu/matrix.h; no include guard.

#if ROBATTR_ISA == ROBATTR_ISA_AVX512
constexpr int kVectorBytes = 64;
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class F>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <class F>
using Vector = typename VectorOf<F>::type;
template <class F>
constexpr int kWidth = kVectorBytes / sizeof(F);

template <class F>
ROBATTR_INLINE Vector<F> load_vector(const F* p) {
  Vector<F> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class F>
ROBATTR_INLINE void store_vector(F* p, Vector<F> v) {
  std::memcpy(p, &v, sizeof v);
}

// sum + a * b, rounded once where the hardware can.
ROBATTR_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> sum) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
  return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;
#endif
}

ROBATTR_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> sum) {
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
  return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
#else
  return sum + a * b;
#endif
}

// Which entries of the left matrix may differ from zero: all, those with column <= row, those with column >= row.
enum class Part { kAll, kLower, kUpper };

template <class F>
struct Operand {
  const F* data;
  int64_t row_stride, step;  // between rows of the product, between its terms
};

// R x V vectors of the product over the terms [first, last); with ``add`` their sum is added to c.
template <class F, int R, int V>
static void matmul_tile(const Operand<F>& a, const F* b, int64_t pitch_b, F* c, int64_t pitch_c, int64_t first,
                        int64_t last, bool add) {
  Vector<F> sum[R][V] = {};
  const F* left[R];
  for (int r = 0; r < R; ++r) left[r] = a.data + r * a.row_stride;
  for (int64_t k = first; k < last; ++k) {
    Vector<F> right[V];
    for (int v = 0; v < V; ++v) right[v] = load_vector<F>(b + k * pitch_b + v * kWidth<F>);
    for (int r = 0; r < R; ++r) {
      const Vector<F> factor = Vector<F>{} + left[r][k * a.step];
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(factor, right[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      F* const p = c + r * pitch_c + v * kWidth<F>;
      store_vector<F>(p, add ? load_vector<F>(p) + sum[r][v] : sum[r][v]);
    }
  }
}

// Columns [0, V vectors) of all rows; R keeps the sums of a tile in registers.
template <class F, int V>
static void matmul_columns(int64_t rows, int64_t terms, const Operand<F>& a, const F* b, int64_t pitch_b, F* c,
                           int64_t pitch_c, bool add, Part part) {
  constexpr int R = ROBATTR_ISA == ROBATTR_ISA_AVX512 ? (V == 4 ? 4 : 8) : (V == 2 ? 4 : 8);
  for (int64_t row = 0; row < rows; row += R) {
    matmul_tile<F, R, V>({a.data + row * a.row_stride, a.row_stride, a.step}, b, pitch_b, c + row * pitch_c, pitch_c,
                         part == Part::kUpper ? row : 0, part == Part::kLower ? row + R : terms, add);
  }
}

template <class F>
static void matmul(int64_t rows, int64_t columns, int64_t terms, const Operand<F>& a, const F* b, int64_t pitch_b, F* c,
                   int64_t pitch_c, bool add, Part part) {
  constexpr int kWide = ROBATTR_ISA == ROBATTR_ISA_AVX512 ? 4 : 2;
  int64_t column = 0;
  for (; column + kWide * kWidth<F> <= columns; column += kWide * kWidth<F>) {
    matmul_columns<F, kWide>(rows, terms, a, b + column, pitch_b, c + column, pitch_c, add, part);
  }
  if constexpr (kWide == 4) {
    for (; column + 2 * kWidth<F> <= columns; column += 2 * kWidth<F>) {
      matmul_columns<F, 2>(rows, terms, a, b + column, pitch_b, c + column, pitch_c, add, part);
    }
  }
  for (; column < columns; column += kWidth<F>) {
    matmul_columns<F, 1>(rows, terms, a, b + column, pitch_b, c + column, pitch_c, add, part);
  }
}

// c = a b, or c += a b.
template <class F>
static void multiply(Matrix<F> a, Matrix<F> b, Matrix<F> c, bool add = false, Part part = Part::kAll) {
  matmul<F>(a.rows, b.columns, a.columns, {a.data, a.columns, 1}, b.data, b.columns, c.data, c.columns, add, part);
}

// c += a^T b. The sum over the rows of a and b is formed before it is added: long sums stay accurate.
template <class F>
static void add_transposed_product(Matrix<F> a, Matrix<F> b, Matrix<F> c) {
  matmul<F>(a.columns, b.columns, a.rows, {a.data, 1, a.columns}, b.data, b.columns, c.data, c.columns, true,
            Part::kAll);
}

// One of log2(width) steps: exchanges the blocks off the diagonal of each 2 x 2 blocks of ``kHalf`` lanes.
template <class V, int kHalf, size_t... kLane>
ROBATTR_INLINE void exchange(V& x, V& y, std::index_sequence<kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  const V first = __builtin_shufflevector(x, y, (kLane & kHalf ? kLanes + kLane - kHalf : kLane)...);
  y = __builtin_shufflevector(x, y, (kLane & kHalf ? kLanes + kLane : kLane + kHalf)...);
  x = first;
}

template <class F, int kHalf>
ROBATTR_INLINE void transpose_step(Vector<F> (&rows)[kWidth<F>]) {
  for (int i = 0; i < kWidth<F>; ++i) {
    if ((i & kHalf) == 0) {
      exchange<Vector<F>, kHalf>(rows[i], rows[i + kHalf], std::make_index_sequence<kWidth<F>>());
    }
  }
  if constexpr (kHalf > 1) transpose_step<F, kHalf / 2>(rows);
}

// out = in^T.
template <class F>
static void transpose(Matrix<F> in, Matrix<F> out) {
  constexpr int kLanes = kWidth<F>;
  for (int64_t r = 0; r < in.rows; r += kLanes) {
    for (int64_t c = 0; c < in.columns; c += kLanes) {
      Vector<F> rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = load_vector<F>(in.row(r + i) + c);
      transpose_step<F, kLanes / 2>(rows);
      for (int i = 0; i < kLanes; ++i) store_vector<F>(out.row(c + i) + r, rows[i]);
    }
  }
}
