// Level counts and packed levels of sparsified maps; definition: robattr_fast/reference/count_sparsified.py.
//
// A thread has the same elements of every row, so that it can count in bytes of shared memory that nobody else touches.
// They are added to the counts in global memory, where clusters may meet, when they might overflow or the image
// changes. Where they do not fit, every selected element is one relaxed atomic addition.
#pragma once

#include "cuda/select.cuh"

namespace robattr_fast {

#include "common/level_edges.h"

struct CountArguments {
  Rows rows;
  Plan plan;
  int k_tau, k_gamma;
  SampleRanks tau_ranks, gamma_ranks;
  int levels;
  int32_t* counts;   // [images, n, levels]
  int32_t* invalid;  // [images]
  uint8_t* packed;   // [rows, row_bytes], or null
  int64_t row_bytes;
};

// Level counts of the elements of one block.
class Counters {
 public:
  ROBATTR_DEVICE Counters(const CountArguments& a, Part part)
      : counts_(a.counts), n_(a.plan.n), levels_(a.levels), part_(part), staged_(a.plan.staged >= 0) {
    if (!staged_) return;
    words_ = rt::dynamic_shared<uint32_t>(a.plan.staged, a.plan.part / 4 * levels_);
    // the first selection is a barrier between this and the first count
    for (int w = rt::thread_index(); w < words(); w += rt::block_size()) words_.store(w, 0);
  }

  // To be called by the whole block before each row.
  ROBATTR_DEVICE void start_row(int64_t image) {
    if (staged_ && (image != image_ || rows_ == kMaxStagedRows)) flush();
    image_ = image;
    ++rows_;
  }

  // One level: bit j of selected tells of element 4 q + j of the part.
  ROBATTR_DEVICE void add(int q, uint32_t selected) const {
    if (staged_) {
      const uint32_t bytes = (selected & 1) | (selected & 2) << 7 | (selected & 4) << 14 | (selected & 8) << 21;
      words_.store(q, words_.load(q) + bytes);
    } else {
      for (int j = 0; j < 4; ++j) {
        if (selected >> j & 1) rt::add_global(global() + 4 * q + j, 1);
      }
    }
  }

  // Element i of the part takes a level >= 1.
  ROBATTR_DEVICE void add(int i, int level) const {
    const int64_t place = static_cast<int64_t>(i) * levels_ + level - 1;
    if (staged_) {
      const rt::Shared<uint8_t> bytes = words_.template as<uint8_t>();
      bytes.store(static_cast<int>(place), static_cast<uint8_t>(bytes.load(static_cast<int>(place)) + 1));
    } else {
      rt::add_global(global() + place, 1);
    }
  }

  ROBATTR_DEVICE void flush() {
    if (!staged_ || rows_ == 0) return;
    rt::sync_threads();
#pragma unroll 1
    for (int w = rt::thread_index(); w < words(); w += rt::block_size()) {
      const uint32_t word = words_.load(w);
      if (word == 0) continue;
      words_.store(w, 0);
      for (int j = 0; j < 4; ++j) {
        const uint32_t count = word >> 8 * j & 0xFF;
        if (count != 0) rt::add_global(global() + static_cast<int64_t>(w) * 4 + j, static_cast<int32_t>(count));
      }
    }
    rt::sync_threads();
    rows_ = 0;
  }

 private:
  ROBATTR_DEVICE int words() const { return (part_.length + 7) / 8 * 2 * levels_; }
  ROBATTR_DEVICE int32_t* global() const { return counts_ + (image_ * n_ + part_.first) * levels_; }

  int32_t* counts_;
  int64_t n_;
  int levels_;
  Part part_;
  bool staged_;
  rt::Shared<uint32_t> words_;
  int64_t image_ = 0;
  int rows_ = 0;
};

// The number of edges below key, 0 to 15; edges ascend and end in keys above all.
template <class Key>
ROBATTR_INLINE int level_of(rt::Shared<Key> edges, Key key) {
  int level = 0;
#pragma unroll
  for (int step = kEdges / 2; step > 0; step /= 2) {
    if (edges.load(level + step - 1) < key) level += step;
  }
  return level;
}

// Zeros behind the levels of the row's last element.
ROBATTR_INLINE void pad_packed(const CountArguments& a, Part part, uint8_t* row) {
  if (part.length == 0 || part.first + part.length < a.plan.n) return;
  const int per_byte = a.levels == 1 ? 8 : 2;
  const int written = (part.first + (part.length + 7) / 8 * 8) / per_byte;
  for (int64_t i = written + rt::thread_index(); i < a.row_bytes; i += rt::block_size()) row[i] = 0;
}

template <class Element, bool kResident>
ROBATTR_KERNEL(kMaxThreads, kResidentBlocks<Element, kResident>)
count_sparsified_kernel(const CountArguments a) {
  using Key = typename Element::Key;
  RowReader<Element, kResident> reader(a.plan);
  const Part part = reader.part();
  const int quads = (part.length + 7) / 8 * 2;
  Counters counters(a, part);
  const rt::Shared<Key> edges = rt::dynamic_shared<Key>(a.plan.edges, kEdges);
  const RowRange range = rows_of_cluster(a.rows.count);
  for (int64_t r = range.begin; r < range.end; ++r) {
    const int64_t image = r / a.rows.samples;
    Extremes<Key> extremes;
    const Interval<Key> threshold = reader.select(a.rows, r, a.k_tau, a.tau_ranks, extremes);
    const bool finite = extremes.low > -FloatBits<Key>::kInfinity && extremes.high < FloatBits<Key>::kInfinity;
    uint8_t* const packed = a.packed == nullptr ? nullptr : a.packed + r * a.row_bytes;
    if (packed != nullptr) pad_packed(a, part, packed);
    if (!finite) {
      if (rt::cluster_rank() == 0 && rt::thread_index() == 0) rt::add_global(a.invalid + image, 1);
      if (packed == nullptr) continue;
    }

    // Keys above the cut are selected: of ties at the threshold all that fit, else none; only positive scores.
    const bool ties_fit = threshold.above + threshold.population <= a.k_tau;
    Key cut = most<Key>(0, ties_fit ? threshold.low - 1 : threshold.low);
    if (!finite) cut = Limits<Key>::kAboveAll;
    if (a.levels > 1) {
      Key g = threshold.low;
      if (finite && a.k_gamma != a.k_tau) {
        g = reader.select_above(a.rows, r, a.k_gamma, a.gamma_ranks, extremes, threshold).low;
      }
      g = finite ? most<Key>(0, g) : 0;
      if (rt::thread_index() < kEdges) {
        const int step = rt::thread_index();
        edges.store(step, step < a.levels ? level_edge(g, step, a.levels) : Limits<Key>::kAboveAll);
      }
      rt::sync_threads();
    }

    counters.start_row(image);
    uint8_t* const bytes = packed == nullptr ? nullptr : packed + part.first / (a.levels == 1 ? 8 : 2);
    if (a.levels == 1) {
      reader.each(a.rows, r, [&](int q, const rt::Quad<Key>& keys) {
        uint32_t selected = 0;
        for (int j = 0; j < 4; ++j) selected |= static_cast<uint32_t>(keys.value[j] > cut) << j;
        if (q < quads) counters.add(q, selected);
        if (bytes == nullptr) return;
        const uint32_t neighbour = rt::shuffle_xor(selected, 1);
        if (q < quads && q % 2 == 0) bytes[q / 2] = static_cast<uint8_t>(selected | neighbour << 4);
      });
    } else {
      reader.each(a.rows, r, [&](int q, const rt::Quad<Key>& keys) {
        uint32_t nibbles = 0;
        for (int j = 0; j < 4; ++j) {
          if (keys.value[j] <= cut) continue;
          const int level = level_of(edges, keys.value[j]);
          counters.add(4 * q + j, level);
          nibbles |= static_cast<uint32_t>(level) << 4 * j;
        }
        if (bytes == nullptr || q >= quads) return;
        bytes[2 * q] = static_cast<uint8_t>(nibbles);
        bytes[2 * q + 1] = static_cast<uint8_t>(nibbles >> 8);
      });
    }
  }
  counters.flush();
  rt::cluster_sync();  // another block may still read this one's histogram
}

}  // namespace robattr_fast
