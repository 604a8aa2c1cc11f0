#include "cuda/launch.cuh"
#include "cuda/topk_threshold.cuh"

namespace robattr_fast::cuda {

void topk_threshold(Tensor out, Tensor scores, int64_t k) {
  const int device = scores.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t n = scores.size(scores.dim() - 1);
  dispatch_element(scores.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    using Key = typename Element::Key;
    const ThresholdArguments<Key> a{rows_of(scores), make_plan(n, sizeof(Key), 0, describe_device(device)),
                                    static_cast<int>(k), sample_ranks(k, n), static_cast<Key*>(out.mutable_data_ptr())};
    launch(a.plan.resident ? &topk_threshold_kernel<Element, true> : &topk_threshold_kernel<Element, false>, a, device);
  });
}

}  // namespace robattr_fast::cuda
