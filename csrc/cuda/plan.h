// How a row is laid out on a GPU: decided on the host, without CUDA, so that tests can ask for any device.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace robattr_fast {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kMaxCluster = 8;       // larger ones are not portable
constexpr int kSamples = 2048;       // elements of a row from which its threshold is guessed
constexpr int kMaxStagedRows = 255;  // counters of one byte are added to those in global memory before they overflow
constexpr int kEdges = 16;
constexpr int64_t kLongestRow = INT32_MAX - 63;  // elements: padded to whole vectors they can still be numbered

// Shared memory that one block may have, and how much of it if two are to run on a multiprocessor.
struct Device {
  int shared_per_block;
  int shared_for_two;
  bool clusters;
};

// Byte offsets into the shared memory of a block.
struct Plan {
  int n, part;           // elements of a row, and of the part that one block holds (a multiple of 32)
  int threads, cluster;  // per block; blocks per cluster
  int bins;              // of a histogram: a power of two, at most four per thread
  int sampled;           // elements that each block samples; 0: none
  bool resident;         // the row stays in shared memory; else it is streamed from global memory
  int list_capacity;     // keys (streamed rows)
  int exchange_bytes;    // of one of the two buffers through which blocks exchange histograms, totals and extremes
  int row, list, exchange, scan, edges, staged;  // offsets; staged < 0: no counters in shared memory
  int shared_bytes;
};

// A guess of where the k-th largest lies: between the samples of these ranks.
struct SampleRanks {
  int above, below;  // above = 0: no sample is surely above it
};

inline SampleRanks sample_ranks(int64_t k, int64_t n) {
  constexpr double kDeviations = 4;
  const double share = static_cast<double>(k) / static_cast<double>(n);
  const double middle = kSamples * share, spread = kDeviations * std::sqrt(middle * (1 - share)) + 1;
  return {std::max(0, static_cast<int>(middle - spread)), static_cast<int>(std::ceil(middle + spread))};
}

// levels = 0: no counting.
inline Plan make_plan(int64_t n, int key_bytes, int levels, const Device& device) {
  constexpr int kComfortable = 12288;      // elements per block: 48 KB of floats
  constexpr int kShortestSampled = 16384;  // elements per row
  const auto round_up = [](int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; };

  Plan plan = {};
  plan.n = static_cast<int>(n);
  const auto lay_out = [&](int cluster, bool resident) {
    plan.cluster = cluster;
    plan.resident = resident;
    const int64_t part = round_up((n + cluster - 1) / cluster, 32);
    plan.part = static_cast<int>(part);
    plan.threads = part <= 1024 ? 64 : part <= 2048 ? 128 : part <= 8192 ? 256 : kMaxThreads;
    plan.bins = 1 << std::clamp(static_cast<int>(std::bit_width(static_cast<uint64_t>(part))) - 2, 5,
                                static_cast<int>(std::bit_width(static_cast<unsigned>(plan.threads))) + 1);
    plan.exchange = 0;
    plan.exchange_bytes = 4 * plan.bins + 16 + 2 * kMaxWarps * key_bytes;
    plan.scan = 2 * plan.exchange_bytes;
    plan.edges = plan.scan + 4 * kMaxWarps + 32;
    plan.row = plan.list = plan.edges + kEdges * key_bytes;
    plan.list_capacity = 0;
    return plan.row + (resident ? part * key_bytes : 0);
  };

  int64_t bytes = 0;
  for (int cluster = 1; cluster <= (device.clusters ? kMaxCluster : 1); cluster *= 2) {
    bytes = lay_out(cluster, true);
    if (plan.part <= kComfortable && bytes <= device.shared_per_block) break;
  }
  if (bytes > device.shared_per_block) {
    bytes = lay_out(1, false);
    plan.list_capacity = static_cast<int>(std::max<int64_t>(0, device.shared_for_two - bytes) / key_bytes / 4 * 4);
    bytes += static_cast<int64_t>(plan.list_capacity) * key_bytes;
  }
  plan.sampled = !plan.resident || n >= kShortestSampled ? kSamples / plan.cluster : 0;
  plan.staged = -1;
  if (levels > 0 && plan.resident) {
    const int64_t with_counters = bytes + round_up(static_cast<int64_t>(plan.part) * levels, 16);
    if (with_counters <= device.shared_for_two) {
      plan.staged = static_cast<int>(bytes);
      bytes = with_counters;
    }
  }
  plan.shared_bytes = static_cast<int>(bytes);
  return plan;
}

}  // namespace robattr_fast
