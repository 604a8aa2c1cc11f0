// The CPU kernels that csrc/bindings.cpp registers, and what they share. Arguments were checked in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

namespace robattr_fast {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType scalar_type_of = std::is_same_v<T, double>          ? ScalarType::Double
                                      : std::is_same_v<T, float>         ? ScalarType::Float
                                      : std::is_same_v<T, c10::BFloat16> ? ScalarType::BFloat16
                                                                         : ScalarType::Half;

// f(T{}) for the element type T of a floating-point tensor.
template <class F>
void dispatch_float(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{});
    case ScalarType::Half:
      return f(c10::Half{});
    default:
      STD_TORCH_CHECK(false, "takes float32, float64, bfloat16 or float16");
  }
}

// out [B, q, *S] (contiguous, or channels-last per sample) = x [B, *S] (contiguous) + noise; image_ids int64 [B].
void noisy_samples(Tensor out, Tensor x, double sigma, int64_t seed, int64_t first_sample, Tensor image_ids);

// out int64 [m, m2] = inner products of packed rows [m, bytes] and other [m2, bytes], rows ANDed with mask [bytes].
// symmetric: other is rows, and half of the products are mirrored.
void packed_gram(Tensor out, Tensor rows, Tensor other, std::optional<Tensor> mask, int64_t num_levels, bool symmetric);

// out [rows], float or double, contiguous; scores [rows, n] of any strides.
void topk_threshold(Tensor out, Tensor scores, int64_t k);

// out [rows, n] and pivot [rows], float or double, offset [rows], double, contiguous; scores [rows, n] of any strides.
void soft_topk(Tensor out, Tensor pivot, Tensor offset, Tensor scores, int64_t k, double temperature);

// out [rows, n], float or double, contiguous; scores [rows, n] of any strides. levels = 0: not rounded.
void sparsify(Tensor out, Tensor scores, int64_t k_tau, int64_t k_gamma, int64_t levels);

// counts int32 [B, n, L] and invalid int32 [B] grow; packed uint8 [B, q, row_bytes] is overwritten, all contiguous;
// scores [B, q, n] of any strides. True: a count has overflowed.
bool count_sparsified_(Tensor counts, Tensor invalid, std::optional<Tensor> packed, Tensor scores, int64_t k_tau,
                       int64_t k_gamma);

// lower and upper float64 [B, n]; counts int32 [B, n, L], samples int64 [B], shares float64 [32], all contiguous.
void betting_bounds(Tensor lower, Tensor upper, Tensor counts, Tensor samples, Tensor shares, double log_inverse_delta);

// All tensors [B, H, N, width] with last stride 1: out, q, k, v of one dtype; mask bool [B, keys], contiguous;
// feature_map: its place in FEATURE_MAPS of robattr_fast/reference/linear_attention.py.
void linear_attention(Tensor out, Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask, int64_t feature_map,
                      bool causal, bool normalize, double eps);

void linear_attention_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad, Tensor q, Tensor k, Tensor v,
                               std::optional<Tensor> mask, int64_t feature_map, bool causal, bool normalize,
                               double eps);

void linear_attention_double_backward(Tensor of_grad, Tensor of_q, Tensor of_k, Tensor of_v, Tensor u_q, Tensor u_k,
                                      Tensor u_v, Tensor grad, Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask,
                                      int64_t feature_map, bool causal, bool normalize, double eps);

}  // namespace robattr_fast
