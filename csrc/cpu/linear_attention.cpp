#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/matrix.h"
#include "cpu/operators.h"

namespace robattr_fast {
namespace {

// Segments are summed by themselves, and their sums added up in order: results do not depend on the threads.
constexpr int64_t kSegment = 1024;
// Rows at a time. A causal chunk multiplies all pairs of its rows; longer chunks load the state less often.
constexpr int64_t kChunk = 64, kCausalChunk = 32;
// Matrices in the cache are padded with zeros to a multiple of this.
constexpr int64_t kBlock = 16;

constexpr int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }
constexpr int64_t segments_of(int64_t n) { return (n + kSegment - 1) / kSegment; }

enum class FeatureMap : int64_t { kElu, kRelu, kSquaredRelu, kIdentity };

template <class T>
using ComputeType = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A tensor [B, H, N, width] whose last stride is 1; strides in elements.
struct Strided {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;

  Strided() = default;
  explicit Strided(const Tensor& x)
      : data(const_cast<void*>(x.const_data_ptr())), batch(x.stride(0)), head(x.stride(1)), row(x.stride(2)) {}

  template <class T>
  T* at(int64_t b, int64_t h) const {
    return data == nullptr ? nullptr : static_cast<T*>(data) + b * batch + h * head;
  }
};

struct Problem {
  int64_t batch, heads, queries, keys, width, value_width;
  int64_t pitch, value_pitch, chunk, scratch_bytes;
  FeatureMap map;
  bool causal, normalize;
  double eps;
  const bool* mask;  // [batch, keys], or null
  Strided q, k, v, grad, u_q, u_k, u_v, out[4];
};

// S = sum_j b_j v_j^T and z = sum_j b_j, or T = sum_i a_i w_i^T and t = sum_i e_i a_i; of the second order also their
// derivatives. The letters are those of robattr_fast/reference/linear_attention.py.
template <class F>
struct State {
  Matrix<F> sum, sum_dot;
  F *total = nullptr, *total_dot = nullptr;
};

// r, e, rho and e_dot of each row of a chunk or head.
template <class F>
struct Scalars {
  F *r = nullptr, *e = nullptr, *rho = nullptr, *e_dot = nullptr;
};

}  // namespace
}  // namespace robattr_fast

#define ROBATTR_KERNEL "cpu/linear_attention_kernel.h"
#include "cpu/foreach_isa.h"

namespace robattr_fast {
namespace {

// The states of the segments of a group of heads, which lie in one array of zeros; the scalars of causal heads.
template <class F>
class States {
 public:
  States(const Problem& p, int64_t heads, int64_t segments, bool dot)
      : p_(p),
        segments_(segments),
        matrix_(p.pitch * p.value_pitch),
        size_((dot ? 2 : 1) * (matrix_ + p.pitch)),
        dot_(dot),
        memory_(heads * segments * size_) {}

  State<F> of(int64_t head, int64_t segment) {
    F* const data = memory_.data() + (head * segments_ + segment) * size_;
    State<F> state;
    state.sum = {data, p_.pitch, p_.value_pitch};
    state.total = data + matrix_;
    if (dot_) {
      state.sum_dot = {state.total + p_.pitch, p_.pitch, p_.value_pitch};
      state.total_dot = state.sum_dot.data + matrix_;
    }
    return state;
  }

  void clear() { std::fill(memory_.begin(), memory_.end(), F(0)); }

  // Segment 0 of a head becomes the sum over its segments.
  void add_up(int64_t head) {
    F* const first = of(head, 0).sum.data;
    for (int64_t i = size_; i < segments_ * size_; i += size_) {
      for (int64_t j = 0; j < size_; ++j) first[j] += first[i + j];
    }
  }

  // Each segment of a head becomes the sum over those before it, or behind it.
  void accumulate(int64_t head, bool behind) {
    std::vector<F> sum(size_);
    F* const first = of(head, 0).sum.data;
    for (int64_t step = 0; step < segments_; ++step) {
      F* const segment = first + (behind ? segments_ - 1 - step : step) * size_;
      for (int64_t j = 0; j < size_; ++j) segment[j] = std::exchange(sum[j], sum[j] + segment[j]);
    }
  }

 private:
  const Problem& p_;
  int64_t segments_, matrix_, size_;
  bool dot_;
  std::vector<F> memory_;
};

enum Derivative { kForward, kBackward, kDoubleBackward };

// One group of heads: five phases, of which the first, third and fifth run over all segments at once.
template <class T, int kDerivative>
class Group {
  using F = ComputeType<T>;
  static constexpr bool kDot = kDerivative == kDoubleBackward;

 public:
  Group(const Problem& p, int64_t heads)
      : p_(p),
        key_segments_(segments_of(p.keys)),
        query_segments_(segments_of(p.queries)),
        keys_(p, heads, key_segments_, kDot),
        queries_(p, kDerivative == kForward ? 0 : heads, query_segments_, kDot),
        scalars_(p.causal && kDerivative != kForward ? heads * 4 * p.queries : 0) {}

  // Calls for_each(n, f) for each phase; it must run f(0), ..., f(n - 1).
  template <class ForEach>
  void run(int64_t first_head, int64_t heads, const ForEach& for_each) {
    keys_.clear();
    queries_.clear();
    if (!p_.causal || key_segments_ > 1) {
      for_each(heads * key_segments_, [&](int64_t i) {
        const auto [begin, end] = rows(i % key_segments_, p_.keys);
        ROBATTR_DISPATCH(sum_keys<T>)(p_, first_head + i / key_segments_, begin, end, kDot,
                                      keys_.of(i / key_segments_, i % key_segments_));
      });
      for_each(heads, [&](int64_t i) { p_.causal ? keys_.accumulate(i, false) : keys_.add_up(i); });
    }
    for_each(heads * query_segments_, [&](int64_t i) {
      const int64_t head = i / query_segments_, segment = i % query_segments_;
      const auto [begin, end] = rows(segment, p_.queries);
      const State<F> keys = keys_.of(head, p_.causal ? segment : 0);
      if constexpr (kDerivative == kForward) {
        ROBATTR_DISPATCH(forward_queries<T>)(p_, first_head + head, begin, end, keys);
      } else {
        const bool summed = !p_.causal || query_segments_ > 1;
        ROBATTR_DISPATCH(derivative_queries<T, kDot>)
        (p_, first_head + head, begin, end, keys, summed ? queries_.of(head, segment) : State<F>{}, scalars(head));
      }
    });
    if constexpr (kDerivative != kForward) {
      for_each(heads, [&](int64_t i) { p_.causal ? queries_.accumulate(i, true) : queries_.add_up(i); });
      for_each(heads * key_segments_, [&](int64_t i) {
        const int64_t head = i / key_segments_, segment = i % key_segments_;
        const auto [begin, end] = rows(segment, p_.keys);
        ROBATTR_DISPATCH(derivative_keys<T, kDot>)
        (p_, first_head + head, begin, end, queries_.of(head, p_.causal ? segment : 0), scalars(head));
      });
    }
  }

 private:
  static std::pair<int64_t, int64_t> rows(int64_t segment, int64_t n) {
    return {segment * kSegment, std::min((segment + 1) * kSegment, n)};
  }

  Scalars<F> scalars(int64_t head) {
    if (scalars_.empty()) return {};
    F* const r = scalars_.data() + head * 4 * p_.queries;
    return {r, r + p_.queries, r + 2 * p_.queries, r + 3 * p_.queries};
  }

  const Problem& p_;
  int64_t key_segments_, query_segments_;
  States<F> keys_, queries_;
  std::vector<F> scalars_;
};

template <class T, int kDerivative>
void run_heads(const Problem& p) {
  const int64_t heads = p.batch * p.heads, segments = std::max(segments_of(p.keys), segments_of(p.queries));
  if (segments == 1) {
    // A head at a time: its rows are still in the cache in the next phase.
    parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      Group<T, kDerivative> group(p, 1);
      for (int64_t head = begin; head < end; ++head) {
        group.run(head, 1, [](int64_t n, const auto& f) {
          for (int64_t i = 0; i < n; ++i) f(i);
        });
      }
    });
    return;
  }
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t size = std::min(heads, (4 * threads + segments - 1) / segments);
  Group<T, kDerivative> group(p, size);
  for (int64_t first = 0; first < heads; first += size) {
    group.run(first, std::min(size, heads - first), [](int64_t n, const auto& f) {
      parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) f(i);
      });
    });
  }
}

Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, int64_t map,
                   bool causal, bool normalize, double eps) {
  Problem p{};
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.queries = q.size(2);
  p.keys = k.size(2);
  p.width = q.size(3);
  p.value_width = v.size(3);
  p.pitch = padded(p.width);
  p.value_pitch = padded(p.value_width);
  p.chunk = causal ? kCausalChunk : kChunk;
  // Above what any kernel takes: matrices of a chunk, two transposed states.
  const int64_t widest = std::max({p.pitch, p.value_pitch, p.chunk});
  p.scratch_bytes = Arena::bytes_of<double>(32 * p.chunk * widest + 2 * p.pitch * p.value_pitch);
  p.map = static_cast<FeatureMap>(map);
  p.causal = causal;
  p.normalize = normalize;
  p.eps = eps;
  p.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  p.q = Strided(q);
  p.k = Strided(k);
  p.v = Strided(v);
  return p;
}

}  // namespace

void linear_attention(Tensor out, Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask, int64_t feature_map,
                      bool causal, bool normalize, double eps) {
  Problem p = problem_of(q, k, v, mask, feature_map, causal, normalize, eps);
  p.out[0] = Strided(out);
  dispatch_float(q.scalar_type(), [&](auto tag) { run_heads<decltype(tag), kForward>(p); });
}

void linear_attention_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad, Tensor q, Tensor k, Tensor v,
                               std::optional<Tensor> mask, int64_t feature_map, bool causal, bool normalize,
                               double eps) {
  Problem p = problem_of(q, k, v, mask, feature_map, causal, normalize, eps);
  p.grad = Strided(grad);
  p.out[0] = Strided(grad_q);
  p.out[1] = Strided(grad_k);
  p.out[2] = Strided(grad_v);
  dispatch_float(q.scalar_type(), [&](auto tag) { run_heads<decltype(tag), kBackward>(p); });
}

void linear_attention_double_backward(Tensor of_grad, Tensor of_q, Tensor of_k, Tensor of_v, Tensor u_q, Tensor u_k,
                                      Tensor u_v, Tensor grad, Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask,
                                      int64_t feature_map, bool causal, bool normalize, double eps) {
  Problem p = problem_of(q, k, v, mask, feature_map, causal, normalize, eps);
  p.grad = Strided(grad);
  p.u_q = Strided(u_q);
  p.u_k = Strided(u_k);
  p.u_v = Strided(u_v);
  p.out[0] = Strided(of_grad);
  p.out[1] = Strided(of_q);
  p.out[2] = Strided(of_k);
  p.out[3] = Strided(of_v);
  dispatch_float(q.scalar_type(), [&](auto tag) { run_heads<decltype(tag), kDoubleBackward>(p); });
}

}  // namespace robattr_fast
