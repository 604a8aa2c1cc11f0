// Tensors to rows, a device to a plan, a plan to a launch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "cuda/operators.h"
#include "cuda/select.cuh"

namespace robattr_fast {

inline Rows rows_of(const Tensor& scores) {
  const int64_t last = scores.dim() - 1, n = scores.size(last);
  STD_TORCH_CHECK(n <= kLongestRow, "scores: got rows of ", n, " elements, takes at most ", kLongestRow);
  return {scores.const_data_ptr(),          scores.numel() / n,      scores.size(last - 1),
          last == 2 ? scores.stride(0) : 0, scores.stride(last - 1), scores.stride(last)};
}

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

inline Device describe_device(int device) {
  constexpr int kReservedPerBlock = 1024;
  return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) / 2 - kReservedPerBlock,
          attribute(cudaDevAttrClusterLaunch, device) != 0};
}

// f(Element{}) for the element type of the scores.
template <class F>
void dispatch_element(torch::headeronly::ScalarType type, const F& f) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return f(Float32{});
    case ScalarType::Double:
      return f(Float64{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      STD_TORCH_CHECK(false, "takes float32, float64, bfloat16 or float16");
  }
}

// As many clusters as run at once, each with its share of the rows.
template <class Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, int device) {
  const Plan& plan = arguments.plan;
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  // All that a block may have, not what this plan takes: another thread may launch the same kernel by another plan.
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));

  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.gridDim = dim3(static_cast<unsigned>(plan.cluster));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;

  int at_once = 0;
  if (plan.cluster > 1) {
    STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&at_once, kernel, &config));
  } else {
    STD_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, kernel, plan.threads, config.dynamicSmemBytes));
    at_once *= attribute(cudaDevAttrMultiProcessorCount, device);
  }
  STD_TORCH_CHECK(at_once > 0, "no cluster of ", plan.cluster, " blocks with ", plan.shared_bytes,
                  " bytes each fits this GPU");
  config.gridDim.x *= static_cast<unsigned>(std::min<int64_t>(at_once, arguments.rows.count));
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments));
}

}  // namespace robattr_fast
