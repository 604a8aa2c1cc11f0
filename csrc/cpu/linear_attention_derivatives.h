// The backward of kernel attention (kDot = false) and the backward of that (kDot = true), on a segment of one head.
// Included by cpu/linear_attention_kernel.h, whose conventions hold here.

// Copies of the scalars of rows [first, first + count), zeros behind them.
template <class F>
static void load_scalars(const Scalars<F>& from, int64_t first, int64_t count, int64_t rows, const Scalars<F>& to) {
  for (F* Scalars<F>::* which : {&Scalars<F>::r, &Scalars<F>::e, &Scalars<F>::rho, &Scalars<F>::e_dot}) {
    std::copy_n(from.*which + first, count, to.*which);
    std::fill(to.*which + count, to.*which + rows, F(0));
  }
}

template <class F>
static Scalars<F> take_scalars(const Problem& p, Arena& arena) {
  return {arena.take<F>(p.chunk), arena.take<F>(p.chunk), arena.take<F>(p.chunk), arena.take<F>(p.chunk)};
}

// a' = a_dot - rho a
template <class F>
static void make_a_prime(const F* rho, Queries<F>& queries) {
  for (int64_t r = 0; r < queries.a.rows; ++r) {
    for (int64_t c = 0; c < queries.a.columns; c += kWidth<F>) {
      const Vector<F> a = load_vector<F>(queries.a.row(r) + c), a_dot = load_vector<F>(queries.a_dot.row(r) + c);
      store_vector<F>(queries.a_prime.row(r) + c, a_dot - a * rho[r]);
    }
  }
}

// The gradient with respect to x from that with respect to phi(x), of the elements from i on: slope grad, or its
// derivative curvature u grad + slope grad_dot. ``of`` are Queries or Keys.
template <class F, bool kDot, class Side>
ROBATTR_INLINE Vector<F> chain(const Side& of, int64_t i, Vector<F> grad, Vector<F> grad_dot) {
  const Vector<F> slope = load_vector<F>(of.slope.data + i);
  if constexpr (kDot) {
    return load_vector<F>(of.curvature.data + i) * load_vector<F>(of.u.data + i) * grad + slope * grad_dot;
  } else {
    return slope * grad;
  }
}

// Of the rows, where grad = P + e z and grad_dot = Q - rho P + e z_dot + e_dot z.
template <class F, bool kDot>
static void finish_queries(const Queries<F>& queries, const Scalars<F>& s, const F* z, const F* z_dot, int64_t z_pitch,
                           Matrix<F> p, Matrix<F> q) {
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t c = 0; c < p.columns; c += kWidth<F>) {
      const int64_t i = r * p.columns + c;
      const Vector<F> near = load_vector<F>(p.data + i), total = load_vector<F>(z + r * z_pitch + c);
      Vector<F> grad_dot{};
      if constexpr (kDot) {
        const Vector<F> total_dot = load_vector<F>(z_dot + r * z_pitch + c);
        grad_dot = load_vector<F>(q.data + i) - near * s.rho[r] + (total_dot * s.e[r] + total * s.e_dot[r]);
      }
      store_vector<F>(p.data + i, chain<F, kDot>(queries, i, near + total * s.e[r], grad_dot));
    }
  }
}

// Of the keys, where grad = G + t and grad_dot = G_dot + t_dot.
template <class F, bool kDot>
static void finish_keys(const Keys<F>& keys, const F* t, const F* t_dot, int64_t t_pitch, Matrix<F> g,
                        Matrix<F> g_dot) {
  for (int64_t r = 0; r < g.rows; ++r) {
    for (int64_t c = 0; c < g.columns; c += kWidth<F>) {
      const int64_t i = r * g.columns + c;
      const Vector<F> grad = load_vector<F>(g.data + i) + load_vector<F>(t + r * t_pitch + c);
      Vector<F> grad_dot{};
      if constexpr (kDot) grad_dot = load_vector<F>(g_dot.data + i) + load_vector<F>(t_dot + r * t_pitch + c);
      store_vector<F>(g.data + i, chain<F, kDot>(keys, i, grad, grad_dot));
    }
  }
}

// Rows [begin, end): the gradient of q, with kDot also that of grad. ``state`` is that of the keys, causal as in
// forward_queries. The rows are added to ``rows_state`` unless it is empty. Causal: ``scalars`` [queries] are kept for
// derivative_keys.
template <class T, bool kDot>
static void derivative_queries(const Problem& p, int64_t head, int64_t begin, int64_t end, State<ComputeType<T>> state,
                               State<ComputeType<T>> rows_state, Scalars<ComputeType<T>> scalars) {
  using F = ComputeType<T>;
  const Head<T> h = head_of<T>(p, head);
  Arena& arena = Arena::of_thread(p.scratch_bytes);
  Queries<F> queries;
  Keys<F> keys;
  queries.take(p, arena);
  keys.take(p, arena);
  Matrix<F> near_p = arena.matrix<F>(p.chunk, p.pitch), near_q = arena.matrix<F>(p.chunk, p.pitch);
  Matrix<F> o_dot = arena.matrix<F>(p.chunk, p.value_pitch);
  Matrix<F> totals = arena.matrix<F>(p.chunk, p.pitch), totals_dot = arena.matrix<F>(p.chunk, p.pitch);
  const Matrix<F> pair_memory = arena.matrix<F>(p.chunk, p.chunk), pair_dot_memory = arena.matrix<F>(p.chunk, p.chunk);
  const Matrix<F> b_memory = arena.matrix<F>(p.pitch, p.chunk), b_dot_memory = arena.matrix<F>(p.pitch, p.chunk);
  const Matrix<F> v_memory = arena.matrix<F>(p.value_pitch, p.chunk);
  const Matrix<F> sum_memory = arena.matrix<F>(p.value_pitch, p.pitch);
  const Matrix<F> sum_dot_memory = arena.matrix<F>(p.value_pitch, p.pitch);
  const Scalars<F> s = take_scalars<F>(p, arena);
  Matrix<F> sum_t, sum_dot_t;
  int64_t visible = visible_keys(p, h.keep, begin);

  for (int64_t first = begin; first < end; first += p.chunk) {
    const int64_t count = std::min(p.chunk, end - first), rows = padded(count);
    load_queries<T, F, kDot ? Order::kCurvature : Order::kSlope>(p, h, first, count, kDot, queries);
    load_rows<T, F>(h.grad, p.grad.row, first, count, p.value_width, nullptr, queries.w);
    near_p.rows = near_q.rows = o_dot.rows = rows;
    const F *z = state.total, *z_dot = state.total_dot;
    if (p.causal) {
      load_keys<T, F, kDot ? Order::kSlope : Order::kValue>(p, h, first, count, kDot, keys);
      running_sums<F>(keys.b, nullptr, nullptr, nullptr, false, state.total, totals);
      z = totals.data;
      if constexpr (kDot) {
        running_sums<F>(keys.b_dot, nullptr, nullptr, nullptr, false, state.total_dot, totals_dot);
        z_dot = totals_dot.data;
      }
    }
    if (p.causal || first == begin) {
      sum_t = transposed(state.sum, sum_memory);
      if constexpr (kDot) sum_dot_t = transposed(state.sum_dot, sum_dot_memory);
    }
    const int64_t z_pitch = p.causal ? p.pitch : 0;
    row_products<F>(queries.a, z, z_pitch, s.e, false);
    reciprocals<F>(p, h.keep, first, count, rows, s.e, visible, s.r);
    scale_rows<F>(queries.w, s.r);

    multiply(queries.w, sum_t, near_p);
    Matrix<F> weights;
    if (p.causal) {
      weights = pairs(pair_memory, Part::kLower, queries.w, transposed(keys.v, v_memory));
      multiply(weights, keys.b, near_p, true, Part::kLower);
    }
    if constexpr (kDot) {
      row_products<F>(queries.a_dot, z, z_pitch, s.rho, false);
      row_products<F>(queries.a, z_dot, z_pitch, s.rho, true);
      for (int64_t r = 0; r < rows; ++r) s.rho[r] = p.normalize ? s.rho[r] * s.r[r] : F(0);
      make_a_prime<F>(s.rho, queries);
      multiply(queries.a_prime, state.sum, o_dot);
      multiply(queries.a, state.sum_dot, o_dot, true);
      multiply(queries.w, sum_dot_t, near_q);
      if (p.causal) {
        multiply(weights, keys.b_dot, near_q, true, Part::kLower);
        multiply(pairs(pair_dot_memory, Part::kLower, queries.w, transposed(keys.v_dot, v_memory)), keys.b, near_q,
                 true, Part::kLower);
        const Matrix<F> b_t = transposed(keys.b, b_memory), b_dot_t = transposed(keys.b_dot, b_dot_memory);
        multiply(pairs(pair_memory, Part::kLower, queries.a_prime, b_t, queries.a, b_dot_t), keys.v, o_dot, true,
                 Part::kLower);
        multiply(pairs(pair_memory, Part::kLower, queries.a, b_t), keys.v_dot, o_dot, true, Part::kLower);
      }
      scale_rows<F>(o_dot, s.r);
      store_rows<T, F>(o_dot, first, count, p.value_width, nullptr, h.out[0], p.out[0].row);
    }
    row_products<F>(queries.a, near_p.data, p.pitch, s.e, false);
    for (int64_t r = 0; r < rows; ++r) s.e[r] = p.normalize ? -s.r[r] * s.e[r] : F(0);
    if constexpr (kDot) {
      row_products<F>(queries.a_dot, near_p.data, p.pitch, s.e_dot, false);
      row_products<F>(queries.a, near_q.data, p.pitch, s.e_dot, true);
      for (int64_t r = 0; r < rows; ++r) {
        s.e_dot[r] = p.normalize ? -2 * s.rho[r] * s.e[r] - s.r[r] * s.e_dot[r] : F(0);
      }
    }
    finish_queries<F, kDot>(queries, s, z, z_dot, z_pitch, near_p, near_q);
    store_rows<T, F>(near_p, first, count, p.width, nullptr, h.out[kDot], p.out[kDot].row);

    if (rows_state.total != nullptr) {
      add_queries(queries, kDot, rows_state);
      running_sums<F>(queries.a, s.e, nullptr, nullptr, false, rows_state.total, {});
      if constexpr (kDot) {
        running_sums<F>(queries.a_dot, s.e, queries.a.data, s.e_dot, false, rows_state.total_dot, {});
      }
    }
    if (p.causal) {
      add_keys(keys, kDot, state);
      std::copy_n(s.r, count, scalars.r + first);
      std::copy_n(s.e, count, scalars.e + first);
      if constexpr (kDot) {
        std::copy_n(s.rho, count, scalars.rho + first);
        std::copy_n(s.e_dot, count, scalars.e_dot + first);
      }
    }
  }
}

// Keys [begin, end): the gradients of k and v. ``state`` is that of all rows; causal: of those from end on, and becomes
// that from begin on.
template <class T, bool kDot>
static void derivative_keys(const Problem& p, int64_t head, int64_t begin, int64_t end, State<ComputeType<T>> state,
                            Scalars<ComputeType<T>> scalars) {
  using F = ComputeType<T>;
  const Head<T> h = head_of<T>(p, head);
  Arena& arena = Arena::of_thread(p.scratch_bytes);
  Queries<F> queries;
  Keys<F> keys;
  queries.take(p, arena);
  keys.take(p, arena);
  Matrix<F> grad = arena.matrix<F>(p.chunk, p.pitch), grad_dot = arena.matrix<F>(p.chunk, p.pitch);
  Matrix<F> of_v = arena.matrix<F>(p.chunk, p.value_pitch);
  Matrix<F> totals = arena.matrix<F>(p.chunk, p.pitch), totals_dot = arena.matrix<F>(p.chunk, p.pitch);
  const Matrix<F> pair_memory = arena.matrix<F>(p.chunk, p.chunk);
  const Matrix<F> a_memory = arena.matrix<F>(p.pitch, p.chunk), a_prime_memory = arena.matrix<F>(p.pitch, p.chunk);
  const Matrix<F> w_memory = arena.matrix<F>(p.value_pitch, p.chunk);
  const Matrix<F> sum_memory = arena.matrix<F>(p.value_pitch, p.pitch);
  const Matrix<F> sum_dot_memory = arena.matrix<F>(p.value_pitch, p.pitch);
  const Scalars<F> s = take_scalars<F>(p, arena);
  Matrix<F> sum_t, sum_dot_t;

  const int64_t chunks = (end - begin + p.chunk - 1) / p.chunk;
  for (int64_t step = 0; step < chunks; ++step) {
    const int64_t first = begin + (p.causal ? chunks - 1 - step : step) * p.chunk;
    const int64_t count = std::min(p.chunk, end - first), rows = padded(count);
    load_keys<T, F, kDot ? Order::kCurvature : Order::kSlope>(p, h, first, count, kDot, keys);
    grad.rows = grad_dot.rows = of_v.rows = rows;
    if (p.causal || step == 0) {
      sum_t = transposed(state.sum, sum_memory);
      if constexpr (kDot) sum_dot_t = transposed(state.sum_dot, sum_dot_memory);
    }
    multiply(keys.v, sum_t, grad);
    if constexpr (kDot) {
      multiply(keys.v, sum_dot_t, grad_dot);
      multiply(keys.v_dot, sum_t, grad_dot, true);
      multiply(keys.b, state.sum_dot, of_v);
      multiply(keys.b_dot, state.sum, of_v, true);
    } else {
      multiply(keys.b, state.sum, of_v);
    }
    const F *t = state.total, *t_dot = state.total_dot;
    if (p.causal) {
      load_queries<T, F, kDot ? Order::kSlope : Order::kValue>(p, h, first, count, kDot, queries);
      load_rows<T, F>(h.grad, p.grad.row, first, count, p.value_width, nullptr, queries.w);
      load_scalars<F>(scalars, first, count, rows, s);
      scale_rows<F>(queries.w, s.r);
      if constexpr (kDot) make_a_prime<F>(s.rho, queries);
      const Matrix<F> w_t = transposed(queries.w, w_memory), a_t = transposed(queries.a, a_memory);
      Matrix<F> weights = pairs(pair_memory, Part::kUpper, keys.v, w_t);
      multiply(weights, queries.a, grad, true, Part::kUpper);
      if constexpr (kDot) {
        multiply(weights, queries.a_prime, grad_dot, true, Part::kUpper);
        weights = pairs(pair_memory, Part::kUpper, keys.v_dot, w_t);
        multiply(weights, queries.a, grad_dot, true, Part::kUpper);
        weights =
            pairs(pair_memory, Part::kUpper, keys.b, transposed(queries.a_prime, a_prime_memory), keys.b_dot, a_t);
        running_sums<F>(queries.a_dot, s.e, queries.a.data, s.e_dot, true, state.total_dot, totals_dot);
        t_dot = totals_dot.data;
      } else {
        weights = pairs(pair_memory, Part::kUpper, keys.b, a_t);
      }
      multiply(weights, queries.w, of_v, true, Part::kUpper);
      running_sums<F>(queries.a, s.e, nullptr, nullptr, true, state.total, totals);
      t = totals.data;
      add_queries(queries, kDot, state);
    }
    finish_keys<F, kDot>(keys, t, t_dot, p.causal ? p.pitch : 0, grad, grad_dot);
    store_rows<T, F>(grad, first, count, p.width, h.keep, h.out[kDot + 1], p.out[kDot + 1].row);
    store_rows<T, F>(of_v, first, count, p.value_width, h.keep, h.out[kDot + 2], p.out[kDot + 2].row);
  }
}
