// Thresholds of rows [begin, end). Compiled once per instruction set (foreach_isa.h).

#include "cpu/select.h"

// out receives the bits of a float (Key int32_t) or double (int64_t) per row.
template <class Key>
static void threshold_rows(const Rows& rows, int64_t begin, int64_t end, int64_t k, Key* out) {
  auto& scratch = Scratch<Key>::of_thread(rows.n);
  for (int64_t r = begin; r < end; ++r) {
    out[r] = float_bits(select_threshold(row_bits(rows, r, scratch), rows.n, k, scratch));
  }
}
