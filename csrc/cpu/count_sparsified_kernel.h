// Supports of rows [begin, end) as lists of counters to increment. Compiled once per instruction set (foreach_isa.h).

#include "cpu/select.h"

// Row r's list starts at lists + (r - first) * pitch: index * levels + level - 1 of each selected element, in ascending
// order. sizes[r - first] is its length, kInvalid for a row with NaN or inf.
template <class Key>
static void list_rows(const Rows& rows, int64_t begin, int64_t end, int64_t first, int64_t k_tau, int64_t k_gamma,
                      int levels, uint32_t* lists, int64_t pitch, int64_t* sizes) {
  auto& scratch = Scratch<Key>::of_thread(rows.n);
  const uint32_t* index = scratch.index.get();
  const uint32_t* level = scratch.level.get();
  Key edges[kMaxLevels];
  for (int64_t r = begin; r < end; ++r) {
    uint32_t* list = lists + (r - first) * pitch;
    const auto support = select_support(row_bits(rows, r, scratch), rows.n, k_tau, levels == 1 ? 0 : k_gamma, scratch);
    sizes[r - first] = support.finite ? support.size : kInvalid;
    if (!support.finite) continue;
    if (levels == 1) {
      std::memcpy(list, index, support.size * sizeof *list);
    } else {
      level_edges(support.g, levels, edges);
      levels_of(scratch.keys.get(), support.size, edges, levels, scratch.level.get());
      for (int64_t i = 0; i < support.size; ++i) list[i] = index[i] * levels + level[i] - 1;
    }
  }
}
