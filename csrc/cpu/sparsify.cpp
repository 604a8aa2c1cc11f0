#include "cpu/select_rows.h"

#define ROBATTR_KERNEL "cpu/sparsify_kernel.h"
#include "cpu/foreach_isa.h"

namespace robattr_fast {

void sparsify(Tensor out, Tensor scores, int64_t k_tau, int64_t k_gamma, int64_t levels) {
  const Rows rows(scores);
  dispatch_key(rows.type, [&](auto tag) {
    using Key = decltype(tag);
    using Float = std::conditional_t<std::is_same_v<Key, int64_t>, double, float>;
    const auto kernel = ROBATTR_DISPATCH(sparsify_rows<Key>);
    auto* maps = static_cast<Float*>(out.mutable_data_ptr());
    parallel_for(0, rows.count, rows_per_task(rows.n), [&](int64_t begin, int64_t end) {
      kernel(rows, begin, end, k_tau, k_gamma, static_cast<int>(levels), maps);
    });
  });
}

}  // namespace robattr_fast
