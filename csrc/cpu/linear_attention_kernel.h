// Kernel attention and its first two derivatives on a segment of the rows or keys of one head, in chunks. The formulas
// and the letters are those of robattr_fast/reference/linear_attention.py; a trailing _dot is its dot. Compiled once
// per instruction set (foreach_isa.h).
//
// Causal: the state holds what came before the chunk, and pairs within the chunk go through a matrix of chunk x chunk.

#include "cpu/small_matmul.h"
// small_matmul.h comes first
#include "cpu/feature_rows.h"

// The rows of one head.
template <class T>
struct Head {
  const T *q, *k, *v, *grad, *u_q, *u_k, *u_v;
  const bool* keep;
  T* out[4];
};

template <class T>
static Head<T> head_of(const Problem& p, int64_t head) {
  const int64_t batch = head / p.heads, index = head % p.heads;
  const auto start = [&](const Strided& x) { return x.at<T>(batch, index); };
  Head<T> h{start(p.q),
            start(p.k),
            start(p.v),
            start(p.grad),
            start(p.u_q),
            start(p.u_k),
            start(p.u_v),
            p.mask == nullptr ? nullptr : p.mask + batch * p.keys,
            {}};
  for (int i = 0; i < 4; ++i) h.out[i] = start(p.out[i]);
  return h;
}

// A chunk of keys: b = phi(k), phi'(k), phi''(k), u_k, b_dot; v, v_dot.
template <class F>
struct Keys {
  Matrix<F> b, slope, curvature, u, b_dot, v, v_dot;

  void take(const Problem& p, Arena& arena) {
    for (Matrix<F>* m : {&b, &slope, &curvature, &u, &b_dot}) *m = arena.matrix<F>(p.chunk, p.pitch);
    for (Matrix<F>* m : {&v, &v_dot}) *m = arena.matrix<F>(p.chunk, p.value_pitch);
  }

  void resize(int64_t rows) {
    for (Matrix<F>* m : {&b, &slope, &curvature, &u, &b_dot, &v, &v_dot}) m->rows = rows;
  }
};

// A chunk of queries: a = phi(q), phi'(q), phi''(q), u_q, a_dot, a' = a_dot - rho a; w.
template <class F>
struct Queries {
  Matrix<F> a, slope, curvature, u, a_dot, a_prime, w;

  void take(const Problem& p, Arena& arena) {
    for (Matrix<F>* m : {&a, &slope, &curvature, &u, &a_dot, &a_prime}) *m = arena.matrix<F>(p.chunk, p.pitch);
    w = arena.matrix<F>(p.chunk, p.value_pitch);
  }

  void resize(int64_t rows) {
    for (Matrix<F>* m : {&a, &slope, &curvature, &u, &a_dot, &a_prime, &w}) m->rows = rows;
  }
};

// phi of rows [first, first + count) with its derivatives, and its derivative in the direction u where u is given.
template <class T, class F, Order kOrder>
static void load_features(const Problem& p, const T* x, int64_t stride, const T* u, int64_t u_stride, int64_t first,
                          int64_t count, const bool* keep, Matrix<F> phi, Matrix<F> slope, Matrix<F> curvature,
                          Matrix<F> direction, Matrix<F> phi_dot) {
  load_rows<T, F>(x, stride, first, count, p.width, keep, phi);
  apply_feature_map<F, kOrder>(p.map, phi, slope, curvature);
  if (p.map == FeatureMap::kElu) clear_padding<F>(first, count, p.width, keep, phi);
  if (u == nullptr) return;
  load_rows<T, F>(u, u_stride, first, count, p.width, keep, direction);
  for (int64_t i = 0; i < phi.rows * phi.columns; i += kWidth<F>) {
    store_vector<F>(phi_dot.data + i, load_vector<F>(slope.data + i) * load_vector<F>(direction.data + i));
  }
}

template <class T, class F, Order kOrder>
static void load_keys(const Problem& p, const Head<T>& h, int64_t first, int64_t count, bool dot, Keys<F>& keys) {
  keys.resize(padded(count));
  load_features<T, F, kOrder>(p, h.k, p.k.row, dot ? h.u_k : nullptr, p.u_k.row, first, count, h.keep, keys.b,
                              keys.slope, keys.curvature, keys.u, keys.b_dot);
  load_rows<T, F>(h.v, p.v.row, first, count, p.value_width, h.keep, keys.v);
  if (dot) load_rows<T, F>(h.u_v, p.u_v.row, first, count, p.value_width, h.keep, keys.v_dot);
}

template <class T, class F, Order kOrder>
static void load_queries(const Problem& p, const Head<T>& h, int64_t first, int64_t count, bool dot,
                         Queries<F>& queries) {
  queries.resize(padded(count));
  load_features<T, F, kOrder>(p, h.q, p.q.row, dot ? h.u_q : nullptr, p.u_q.row, first, count, nullptr, queries.a,
                              queries.slope, queries.curvature, queries.u, queries.a_dot);
}

// out_r = x_r . y_r, added to out_r with ``add``; y_pitch = 0: the same y for all.
template <class F>
static void row_products(Matrix<F> x, const F* y, int64_t y_pitch, F* out, bool add) {
  for (int64_t r = 0; r < x.rows; r += kWidth<F>) {
    Vector<F> sums[kWidth<F>] = {};
    for (int i = 0; i < kWidth<F>; ++i) {
      const F *left = x.row(r + i), *right = y + (r + i) * y_pitch;
      for (int64_t c = 0; c < x.columns; c += kWidth<F>) {
        sums[i] = multiply_add(load_vector<F>(left + c), load_vector<F>(right + c), sums[i]);
      }
    }
    transpose_step<F, kWidth<F> / 2>(sums);
    for (int n = kWidth<F> / 2; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) sums[i] += sums[i + n];
    }
    store_vector<F>(out + r, add ? load_vector<F>(out + r) + sums[0] : sums[0]);
  }
}

// y += alpha x
template <class F>
ROBATTR_INLINE void add_multiple(F alpha, const F* x, F* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth<F>) {
    store_vector<F>(y + i, multiply_add(Vector<F>{} + alpha, load_vector<F>(x + i), load_vector<F>(y + i)));
  }
}

template <class F>
static void scale_rows(Matrix<F> x, const F* factor) {
  for (int64_t r = 0; r < x.rows; ++r) {
    F* const row = x.row(r);
    for (int64_t c = 0; c < x.columns; c += kWidth<F>) store_vector<F>(row + c, load_vector<F>(row + c) * factor[r]);
  }
}

// Row i of ``rows`` = total + sum_{j <= i} x_j (backward: j >= i), where x_j = alpha_j x_j + beta_j y_j; the sum over
// the chunk is formed first. total becomes the row that comes last. Null alpha: x_j alone. Null y: alpha_j x_j.
template <class F>
static void running_sums(Matrix<F> x, const F* alpha, const F* y, const F* beta, bool backward, F* total,
                         Matrix<F> rows) {
  rows.rows = x.rows;
  const int64_t n = x.columns;
  for (int64_t c = 0; c < n; c += kWidth<F>) {
    Vector<F> sum = {};
    const Vector<F> before = load_vector<F>(total + c);
    for (int64_t step = 0; step < x.rows; ++step) {
      const int64_t r = backward ? x.rows - 1 - step : step;
      Vector<F> term = load_vector<F>(x.row(r) + c);
      if (alpha != nullptr) term *= alpha[r];
      if (y != nullptr) term = multiply_add(Vector<F>{} + beta[r], load_vector<F>(y + r * n + c), term);
      sum += term;
      if (rows.data != nullptr) store_vector<F>(rows.row(r) + c, before + sum);
    }
    store_vector<F>(total + c, before + sum);
  }
}

// Zeros above (column > row) or below (column < row) the diagonal.
template <class F>
static void keep_part(Matrix<F> m, Part part) {
  for (int64_t r = 0; r < m.rows; ++r) {
    if (part == Part::kLower) {
      std::fill(m.row(r) + r + 1, m.row(r) + m.columns, F(0));
    } else {
      std::fill(m.row(r), m.row(r) + r, F(0));
    }
  }
}

// out = the part of x y, or with x2 and y2 of x y + x2 y2.
template <class F>
static Matrix<F> pairs(Matrix<F> out, Part part, Matrix<F> x, Matrix<F> y, Matrix<F> x2 = {}, Matrix<F> y2 = {}) {
  out.rows = out.columns = x.rows;
  multiply(x, y, out);
  if (x2.data != nullptr) multiply(x2, y2, out, true);
  keep_part(out, part);
  return out;
}

// x^T in memory taken for it.
template <class F>
static Matrix<F> transposed(Matrix<F> x, Matrix<F> memory) {
  const Matrix<F> out{memory.data, x.columns, x.rows};
  transpose(x, out);
  return out;
}

template <class F>
static void add_keys(const Keys<F>& keys, bool dot, State<F> state) {
  add_transposed_product(keys.b, keys.v, state.sum);
  if (!dot) return;
  add_transposed_product(keys.b_dot, keys.v, state.sum_dot);
  add_transposed_product(keys.b, keys.v_dot, state.sum_dot);
}

template <class F>
static void add_queries(const Queries<F>& queries, bool dot, State<F> state) {
  add_transposed_product(queries.a, queries.w, state.sum);
  if (dot) add_transposed_product(queries.a_prime, queries.w, state.sum_dot);
}

// The state of the keys [begin, end) is added to ``state``.
template <class T>
static void sum_keys(const Problem& p, int64_t head, int64_t begin, int64_t end, bool dot,
                     State<ComputeType<T>> state) {
  using F = ComputeType<T>;
  const Head<T> h = head_of<T>(p, head);
  Arena& arena = Arena::of_thread(p.scratch_bytes);
  Keys<F> keys;
  keys.take(p, arena);
  for (int64_t first = begin; first < end; first += p.chunk) {
    const int64_t count = std::min(p.chunk, end - first);
    if (dot) {
      load_keys<T, F, Order::kSlope>(p, h, first, count, true, keys);
      running_sums<F>(keys.b_dot, nullptr, nullptr, nullptr, false, state.total_dot, {});
    } else {
      load_keys<T, F, Order::kValue>(p, h, first, count, false, keys);
    }
    running_sums<F>(keys.b, nullptr, nullptr, nullptr, false, state.total, {});
    add_keys(keys, dot, state);
  }
}

// r of each row of a chunk; ``sums`` are the sums of its weights, ``visible`` the keys that the row before it sees.
template <class F>
static void reciprocals(const Problem& p, const bool* keep, int64_t first, int64_t count, int64_t rows, const F* sums,
                        int64_t& visible, F* r) {
  for (int64_t i = 0; i < rows; ++i) {
    F denominator = sums[i] + static_cast<F>(p.eps);
    if (!p.normalize) {
      if (p.causal && i < count) visible += keep == nullptr || keep[first + i];
      denominator = static_cast<F>(visible);
    }
    // Where the reciprocal would overflow the row has no result.
    r[i] = std::abs(denominator) * std::numeric_limits<F>::max() < 1 ? F(0) : F(1) / denominator;
  }
}

static int64_t visible_keys(const Problem& p, const bool* keep, int64_t before) {
  const int64_t end = p.causal ? before : p.keys;
  return keep == nullptr ? end : std::count(keep, keep + end, true);
}

// o = r (S^T a) of the rows [begin, end). Causal: state is that of the keys before begin and becomes that before end.
template <class T>
static void forward_queries(const Problem& p, int64_t head, int64_t begin, int64_t end, State<ComputeType<T>> state) {
  using F = ComputeType<T>;
  const Head<T> h = head_of<T>(p, head);
  Arena& arena = Arena::of_thread(p.scratch_bytes);
  Queries<F> queries;
  Keys<F> keys;
  queries.take(p, arena);
  keys.take(p, arena);
  Matrix<F> out = arena.matrix<F>(p.chunk, p.value_pitch), totals = arena.matrix<F>(p.chunk, p.pitch);
  const Matrix<F> b_t = arena.matrix<F>(p.pitch, p.chunk), near = arena.matrix<F>(p.chunk, p.chunk);
  F* const sums = arena.take<F>(p.chunk);
  F* const r = arena.take<F>(p.chunk);
  int64_t visible = visible_keys(p, h.keep, begin);
  for (int64_t first = begin; first < end; first += p.chunk) {
    const int64_t count = std::min(p.chunk, end - first);
    load_queries<T, F, Order::kValue>(p, h, first, count, false, queries);
    out.rows = queries.a.rows;
    multiply(queries.a, state.sum, out);
    if (p.causal) {
      load_keys<T, F, Order::kValue>(p, h, first, count, false, keys);
      multiply(pairs(near, Part::kLower, queries.a, transposed(keys.b, b_t)), keys.v, out, true, Part::kLower);
      add_keys(keys, false, state);
      running_sums<F>(keys.b, nullptr, nullptr, nullptr, false, state.total, totals);
    }
    row_products<F>(queries.a, p.causal ? totals.data : state.total, p.causal ? p.pitch : 0, sums, false);
    reciprocals<F>(p, h.keep, first, count, out.rows, sums, visible, r);
    scale_rows<F>(out, r);
    store_rows<T, F>(out, first, count, p.value_width, nullptr, h.out[0], p.out[0].row);
  }
}

#include "cpu/linear_attention_derivatives.h"
