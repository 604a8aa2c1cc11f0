#include "cuda/count_sparsified.cuh"
#include "cuda/launch.cuh"

namespace robattr_fast::cuda {

bool count_sparsified_(Tensor counts, Tensor invalid, std::optional<Tensor> packed, Tensor scores, int64_t k_tau,
                       int64_t k_gamma) {
  const int device = scores.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t n = scores.size(2), levels = counts.size(2);
  dispatch_element(scores.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    const Plan plan = make_plan(n, sizeof(typename Element::Key), static_cast<int>(levels), describe_device(device));
    const CountArguments a{rows_of(scores),
                           plan,
                           static_cast<int>(k_tau),
                           static_cast<int>(k_gamma),
                           sample_ranks(k_tau, n),
                           sample_ranks(k_gamma, n),
                           static_cast<int>(levels),
                           static_cast<int32_t*>(counts.mutable_data_ptr()),
                           static_cast<int32_t*>(invalid.mutable_data_ptr()),
                           packed ? static_cast<uint8_t*>(packed->mutable_data_ptr()) : nullptr,
                           packed ? packed->size(2) : 0};
    launch(plan.resident ? &count_sparsified_kernel<Element, true> : &count_sparsified_kernel<Element, false>, a,
           device);
  });
  return false;
}

}  // namespace robattr_fast::cuda
