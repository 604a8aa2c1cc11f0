#include "cpu/select_rows.h"

#define ROBATTR_KERNEL "cpu/soft_topk_kernel.h"
#include "cpu/foreach_isa.h"

namespace robattr_fast {

void soft_topk(Tensor out, Tensor pivot, Tensor offset, Tensor scores, int64_t k, double temperature) {
  const Rows rows(scores);
  auto* offsets = static_cast<double*>(offset.mutable_data_ptr());
  dispatch_key(rows.type, [&](auto tag) {
    using Key = decltype(tag);
    using Float = std::conditional_t<std::is_same_v<Key, int64_t>, double, float>;
    const auto kernel = ROBATTR_DISPATCH(wide::soft_topk_rows<Key>);
    auto* maps = static_cast<Float*>(out.mutable_data_ptr());
    auto* pivots = static_cast<Float*>(pivot.mutable_data_ptr());
    parallel_for(0, rows.count, rows_per_task(rows.n),
                 [&](int64_t begin, int64_t end) { kernel(rows, begin, end, k, temperature, maps, pivots, offsets); });
  });
}

}  // namespace robattr_fast
