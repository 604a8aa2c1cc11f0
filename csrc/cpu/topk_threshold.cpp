#include "cpu/select_rows.h"

#define ROBATTR_KERNEL "cpu/topk_threshold_kernel.h"
#include "cpu/foreach_isa.h"

namespace robattr_fast {

void topk_threshold(Tensor out, Tensor scores, int64_t k) {
  const Rows rows(scores);
  dispatch_key(rows.type, [&](auto tag) {
    using Key = decltype(tag);
    const auto kernel = ROBATTR_DISPATCH(threshold_rows<Key>);
    auto* thresholds = static_cast<Key*>(out.mutable_data_ptr());
    parallel_for(0, rows.count, rows_per_task(rows.n),
                 [&](int64_t begin, int64_t end) { kernel(rows, begin, end, k, thresholds); });
  });
}

}  // namespace robattr_fast
