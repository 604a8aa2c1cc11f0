// The exact k-th largest score of each row; definition: robattr_fast/reference/topk_threshold.py.
#pragma once

#include "cuda/select.cuh"

namespace robattr_fast {

template <class Key>
struct ThresholdArguments {
  Rows rows;
  Plan plan;
  int k;
  SampleRanks ranks;
  Key* out;  // [rows], the bits of a float or double
};

template <class Element, bool kResident>
ROBATTR_KERNEL(kMaxThreads, kResidentBlocks<Element, kResident>)
topk_threshold_kernel(const ThresholdArguments<typename Element::Key> a) {
  using Key = typename Element::Key;
  RowReader<Element, kResident> reader(a.plan);
  const RowRange range = rows_of_cluster(a.rows.count);
  for (int64_t r = range.begin; r < range.end; ++r) {
    Extremes<Key> extremes;
    const Interval<Key> threshold = reader.select(a.rows, r, a.k, a.ranks, extremes);
    if (rt::cluster_rank() == 0 && rt::thread_index() == 0) a.out[r] = float_bits(threshold.low);
  }
  rt::cluster_sync();  // another block may still read this one's histogram
}

}  // namespace robattr_fast
