// Sparsified maps of rows [begin, end). Compiled once per instruction set (foreach_isa.h).

#include "cpu/select.h"

// out [rows, n]; levels = 0: min(s / g, 1), else l / levels.
template <class Key>
static void sparsify_rows(const Rows& rows, int64_t begin, int64_t end, int64_t k_tau, int64_t k_gamma, int levels,
                          typename FloatBits<Key>::Float* out) {
  using Float = typename FloatBits<Key>::Float;
  auto& scratch = Scratch<Key>::of_thread(rows.n);
  const Key* keys = scratch.keys.get();
  const uint32_t* index = scratch.index.get();
  Key edges[kMaxLevels];
  Float values[kMaxLevels + 1];
  for (int l = 0; l <= levels; ++l) values[l] = static_cast<Float>(l) / static_cast<Float>(levels);
  for (int64_t r = begin; r < end; ++r) {
    Float* row = out + r * rows.n;
    const auto support = select_support(row_bits(rows, r, scratch), rows.n, k_tau, levels == 1 ? 0 : k_gamma, scratch);
    if (!support.finite) {
      std::fill(row, row + rows.n, std::numeric_limits<Float>::quiet_NaN());
      continue;
    }
    std::memset(row, 0, rows.n * sizeof *row);
    if (levels == 1 || support.g == 0) {
      for (int64_t i = 0; i < support.size; ++i) row[index[i]] = 1;
    } else if (levels == 0) {
      Float g;
      std::memcpy(&g, &support.g, sizeof g);
      for (int64_t i = 0; i < support.size; ++i) {
        Float s;
        std::memcpy(&s, keys + i, sizeof s);
        row[index[i]] = keys[i] < support.g ? s / g : 1;
      }
    } else {
      level_edges(support.g, levels, edges);
      levels_of(keys, support.size, edges, levels, scratch.level.get());
      for (int64_t i = 0; i < support.size; ++i) row[index[i]] = values[scratch.level[i]];
    }
  }
}
