#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/operators.h"

namespace robattr_fast {
namespace {

constexpr int kShares = 32;
constexpr int kMaxLevels = 15;
// Shares are evaluated so many at a time.
constexpr int kBlock = 8;
// Shares whose log wealth falls short of the best by this much are left out.
constexpr double kNegligible = 32;
// Bounds below 1e-280 are returned as 0: ln of it.
constexpr double kLogTiny = -644.72382603833279;
// What the last step may lose: of ln W, and of the bound, relatively.
constexpr double kLostWealth = 4e-9, kLostBound = 3e-10;
constexpr int kHalleySteps = 12, kMaxSteps = 100;
constexpr int64_t kRowsPerTask = 64;

// What is the same for all rows. target: ln(1/delta); guessed_target adds what the best share gives up to the others.
struct Grid {
  alignas(64) double share[kShares];
  alignas(64) double rest[kShares];
  alignas(64) double log_share[kShares];
  alignas(64) double log_rest[kShares];
  double log_level[kMaxLevels + 1];
  double log_shares, target, guessed_target;
};

// The samples of one element: `zeros` at level 0, count[i] at level[i] of `levels`, `above` of these, `total` in all.
struct Row {
  int levels, size;
  double zeros, above, total;
  double count[kMaxLevels], level[kMaxLevels];
};

struct Wealth {
  double log, slope, curvature;
};

double total_of(const double (&lane)[kBlock]) {
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

}  // namespace
}  // namespace robattr_fast

#define ROBATTR_KERNEL "cpu/betting_bounds_kernel.h"
#include "cpu/foreach_isa.h"

namespace robattr_fast {
namespace {

// The distinct rows of counts [n, levels] in order of appearance; number[i] is the place of row i among them.
class DistinctRows {
 public:
  explicit DistinctRows(int64_t n) : number(n) {
    size_t slots = 16;
    while (slots < 2 * static_cast<size_t>(n)) slots *= 2;
    slots_.resize(slots);
  }

  void find(const int32_t* counts, int levels) {
    const size_t mask = slots_.size() - 1;
    std::fill(slots_.begin(), slots_.end(), kEmpty);
    first.clear();
    for (size_t i = 0; i < number.size(); ++i) {
      const int32_t* row = counts + i * levels;
      uint64_t hash = 0;
      for (int l = 0; l < levels; ++l) {
        hash = (hash ^ static_cast<uint32_t>(row[l])) * 0x9E3779B97F4A7C15;
        hash ^= hash >> 32;
      }
      size_t slot = hash & mask;
      while (slots_[slot] != kEmpty && std::memcmp(counts + first[slots_[slot]] * levels, row, levels * sizeof *row)) {
        slot = (slot + 1) & mask;
      }
      if (slots_[slot] == kEmpty) {
        slots_[slot] = static_cast<int64_t>(first.size());
        first.push_back(static_cast<int64_t>(i));
      }
      number[i] = slots_[slot];
    }
  }

  std::vector<int64_t> first, number;

 private:
  static constexpr int64_t kEmpty = -1;
  std::vector<int64_t> slots_;
};

}  // namespace

void betting_bounds(Tensor lower, Tensor upper, Tensor counts, Tensor samples, Tensor shares,
                    double log_inverse_delta) {
  STD_TORCH_CHECK(shares.numel() == kShares, "betting_bounds: takes ", kShares, " shares, got ", shares.numel());
  const int64_t n = counts.size(1);
  const int levels = static_cast<int>(counts.size(2));
  const auto* const count = static_cast<const int32_t*>(counts.const_data_ptr());
  const auto* const sample = static_cast<const int64_t*>(samples.const_data_ptr());
  auto* const low = static_cast<double*>(lower.mutable_data_ptr());
  auto* const high = static_cast<double*>(upper.mutable_data_ptr());

  Grid grid;
  std::memcpy(grid.share, shares.const_data_ptr(), sizeof grid.share);
  grid.target = log_inverse_delta;
  ROBATTR_DISPATCH(fill_tables)(grid);

  const auto kernel = ROBATTR_DISPATCH(bound_rows);
  DistinctRows distinct(n);
  std::vector<double> distinct_low(n), distinct_high(n);
  for (int64_t image = 0; image < counts.size(0); ++image) {
    const int32_t* rows = count + image * n * levels;
    distinct.find(rows, levels);
    parallel_for(0, static_cast<int64_t>(distinct.first.size()), kRowsPerTask, [&](int64_t begin, int64_t end) {
      kernel(grid, rows, levels, sample[image], distinct.first.data(), begin, end, distinct_low.data(),
             distinct_high.data());
    });
    for (int64_t i = 0; i < n; ++i) {
      low[image * n + i] = distinct_low[distinct.number[i]];
      high[image * n + i] = distinct_high[distinct.number[i]];
    }
  }
}

}  // namespace robattr_fast
