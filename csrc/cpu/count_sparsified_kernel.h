// Supports of rows [begin, end) as lists of counters to increment. Compiled once per instruction set (foreach_isa.h).

#include "cpu/select.h"

// Sets the levels of a row's selected elements, ascending, in a row of zeros. Neighbours that share a byte meet in a
// register, and the byte is stored anew: a load would have to wait for the store before it.
template <int kBits>
static void pack_support(const uint32_t* index, const uint32_t* level, int64_t size, uint8_t* row) {
  constexpr uint32_t kPerByte = 8 / kBits;
  uint32_t place = 0, byte = 0;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t last = place;
    place = index[i] / kPerByte;
    const uint32_t same = -static_cast<uint32_t>(place == last);  // a mask: the branch would be a toss-up
    byte = (byte & same) | (kBits == 1 ? 1 : level[i]) << index[i] % kPerByte * kBits;
    row[place] = static_cast<uint8_t>(byte);
  }
}

// Row r's list starts at lists + (r - first) * pitch: index * levels + level - 1 of each selected element, in ascending
// order. sizes[r - first] is its length, kInvalid for a row with NaN or inf.
template <class Key>
static void list_rows(const Rows& rows, int64_t begin, int64_t end, int64_t first, int64_t k_tau, int64_t k_gamma,
                      int levels, uint32_t* lists, int64_t pitch, int64_t* sizes, PackedRows packed) {
  auto& scratch = Scratch<Key>::of_thread(rows.n);
  const uint32_t* index = scratch.index.get();
  const uint32_t* level = scratch.level.get();
  Key edges[kMaxLevels];
  for (int64_t r = begin; r < end; ++r) {
    uint32_t* list = lists + (r - first) * pitch;
    const auto support = select_support(row_bits(rows, r, scratch), rows.n, k_tau, levels == 1 ? 0 : k_gamma, scratch);
    sizes[r - first] = support.finite ? support.size : kInvalid;
    uint8_t* const packed_row = packed.data + r * packed.row_bytes;
    if (packed.data) std::memset(packed_row, 0, packed.row_bytes);
    if (!support.finite) continue;
    if (levels == 1) {
      std::memcpy(list, index, support.size * sizeof *list);
      if (packed.data) pack_support<1>(index, level, support.size, packed_row);
    } else {
      level_edges(support.g, levels, edges);
      levels_of(scratch.keys.get(), support.size, edges, levels, scratch.level.get());
      for (int64_t i = 0; i < support.size; ++i) list[i] = index[i] * levels + level[i] - 1;
      if (packed.data) pack_support<4>(index, level, support.size, packed_row);
    }
  }
}
