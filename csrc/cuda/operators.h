// The CUDA kernels that csrc/bindings.cpp registers. Arguments were checked in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace robattr_fast {

using torch::stable::Tensor;

namespace cuda {

// As their namesakes in cpu/operators.h; nothing waits for the GPU, so that an overflow of the counts is not noticed.
void topk_threshold(Tensor out, Tensor scores, int64_t k);
bool count_sparsified_(Tensor counts, Tensor invalid, std::optional<Tensor> packed, Tensor scores, int64_t k_tau,
                       int64_t k_gamma);

}  // namespace cuda
}  // namespace robattr_fast
