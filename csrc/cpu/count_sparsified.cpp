#include <atomic>
#include <vector>

#include "cpu/select_rows.h"

namespace robattr_fast {
namespace {

constexpr int64_t kInvalid = -1;
// Rows are handled in waves: their lists are made (in parallel over rows), then counted (in parallel over images and
// ranges of counters, so that no two threads meet). A wave's lists stay in the second-level cache where one row allows.
constexpr int64_t kWaveEntries = 1 << 17;
constexpr int64_t kCountersPerTask = 1 << 15;

// Packed levels of all rows (reference/_pack_levels.py), if wanted.
struct PackedRows {
  uint8_t* data = nullptr;
  int64_t row_bytes = 0;
};

}  // namespace
}  // namespace robattr_fast

#define ROBATTR_KERNEL "cpu/count_sparsified_kernel.h"
#include "cpu/foreach_isa.h"

namespace robattr_fast {
namespace {

// Increments counters[list[i]] for the entries in [begin, end); the sign of the result tells of an overflow.
int32_t count_list(int32_t* counters, const uint32_t* list, int64_t size, uint32_t begin, uint32_t end) {
  const uint32_t* first = std::lower_bound(list, list + size, begin);
  const uint32_t* last = std::lower_bound(first, list + size, end);
  int32_t seen = 0;
  for (; first != last; ++first) {
    const int32_t count = static_cast<int32_t>(static_cast<uint32_t>(counters[*first]) + 1);
    counters[*first] = count;
    seen |= count;
  }
  return seen;
}

}  // namespace

bool count_sparsified_(Tensor counts, Tensor invalid, std::optional<Tensor> packed, Tensor scores, int64_t k_tau,
                       int64_t k_gamma) {
  const Rows rows(scores);
  const int levels = static_cast<int>(counts.size(2));
  const int64_t counters = rows.n * levels;
  const int64_t pitch = k_tau + kPadding;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wave = std::min(std::max(kWaveEntries / pitch, int64_t{4}) * threads, rows.count);
  static thread_local std::vector<uint32_t> lists;
  static thread_local std::vector<int64_t> sizes;
  if (lists.size() < static_cast<size_t>(wave * pitch)) lists.resize(wave * pitch);
  if (sizes.size() < static_cast<size_t>(wave)) sizes.resize(wave);
  // thread_local names mean another object in another thread
  uint32_t* const list = lists.data();
  int64_t* const size = sizes.data();
  auto* const counter = static_cast<int32_t*>(counts.mutable_data_ptr());
  auto* const invalid_count = static_cast<int32_t*>(invalid.mutable_data_ptr());
  PackedRows packed_rows;
  if (packed) packed_rows = {static_cast<uint8_t*>(packed->mutable_data_ptr()), packed->size(2)};
  std::atomic<int32_t> seen = 0;

  dispatch_key(rows.type, [&](auto tag) {
    const auto kernel = ROBATTR_DISPATCH(list_rows<decltype(tag)>);
    for (int64_t first = 0; first < rows.count; first += wave) {
      const int64_t last = std::min(first + wave, rows.count);
      parallel_for(first, last, rows_per_task(rows.n), [&](int64_t begin, int64_t end) {
        kernel(rows, begin, end, first, k_tau, k_gamma, levels, list, pitch, size, packed_rows);
      });
      const int64_t first_image = first / rows.samples, images = (last - 1) / rows.samples - first_image + 1;
      const int64_t ranges = (counters + kCountersPerTask - 1) / kCountersPerTask;
      parallel_for(0, images * ranges, 1, [&](int64_t begin, int64_t end) {
        int32_t seen_here = 0;
        for (int64_t task = begin; task < end; ++task) {
          const int64_t image = first_image + task / ranges, range = task % ranges;
          const int64_t from = range * kCountersPerTask, to = std::min(from + kCountersPerTask, counters);
          const int64_t end_row = std::min(last, (image + 1) * rows.samples);
          for (int64_t r = std::max(first, image * rows.samples); r < end_row; ++r) {
            if (size[r - first] == kInvalid) {
              invalid_count[image] += range == 0;
            } else {
              seen_here |= count_list(counter + image * counters, list + (r - first) * pitch, size[r - first],
                                      static_cast<uint32_t>(from), static_cast<uint32_t>(to));
            }
          }
        }
        seen.fetch_or(seen_here, std::memory_order_relaxed);
      });
    }
  });
  return seen < 0;
}

}  // namespace robattr_fast
