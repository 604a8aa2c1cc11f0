// Lower bounds of rows of level counts. Compiled once per instruction set (foreach_isa.h); lanes are shares, and sums
// over shares are formed in the same order whatever the width.
//
// f(x) = ln W(exp x) is convex and falls. A tangent therefore never lies above f: a Newton step from any point ends at
// or below the root of f = target, and needs no check there. Iterates approach the root by Halley's rule until the last
// Newton step loses less than the tolerance.

#include "common/log64.h"

constexpr int kWidth = sizeof(f64) / sizeof(double);

ROBATTR_INLINE f64 load(const double* p) {
  f64 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

ROBATTR_INLINE void store(double* p, f64 v) { std::memcpy(p, &v, sizeof v); }

ROBATTR_INLINE double log_of(double x) {
  f64 unused;
  return log_and_reciprocal(f64{} + x, unused)[0];
}

ROBATTR_INLINE double exp_of(double x) { return exp64(f64{} + x)[0]; }

static void fill_tables(Grid& grid) {
  for (int j = 0; j < kShares; ++j) {
    grid.rest[j] = 1 - grid.share[j];
    grid.log_share[j] = log_of(grid.share[j]);
    grid.log_rest[j] = log_of(grid.rest[j]);
  }
  for (int l = 1; l <= kMaxLevels; ++l) grid.log_level[l] = log_of(l);
  grid.log_shares = log_of(kShares);
  // The sum over shares is about as wide as Laplace's approximation of it, in steps of the grid.
  const double step = (grid.log_share[1] - grid.log_rest[1]) - (grid.log_share[0] - grid.log_rest[0]);
  const double width = 0.5 * (log_of(3.14159265) - log_of(grid.target + grid.log_shares)) - log_of(step);
  grid.guessed_target = grid.target + std::max(grid.log_shares - width, 0.0);
}

// w[j] = exp(log_wealth[j] - largest), 0.0 beyond used. Terms below exp(-700) count as that much: less than rounding.
ROBATTR_INLINE double weigh(const double* log_wealth, double largest, int used, double* w) {
  alignas(64) double sums[kBlock] = {};
  for (int j = 0; j < used; j += kWidth) {
    f64 t = load(log_wealth + j) - largest;
    const f64 floor = f64{} - 700.0;
    t = t < floor ? floor : t;
    const f64 e = exp64(t);
    store(w + j, e);
    store(sums + j % kBlock, load(sums + j % kBlock) + e);
  }
  return total_of(sums);
}

// sum of w[j] value[j]
ROBATTR_INLINE double weighted(const double* w, const double* value, int used) {
  alignas(64) double sums[kBlock] = {};
  for (int j = 0; j < used; j += kWidth) {
    store(sums + j % kBlock, load(sums + j % kBlock) + load(w + j) * load(value + j));
  }
  return total_of(sums);
}

// ln W at the mean m, or a little less, with two derivatives by ln m.
static Wealth wealth_at(const Grid& grid, const Row& row, double m) {
  alignas(64) double log_wealth[kShares], slope[kShares], curvature[kShares], w[kShares];
  double odds[kMaxLevels];
  const double unit = 1 / (row.levels * m);
  for (int i = 0; i < row.size; ++i) odds[i] = row.level[i] * unit;
  double largest = -INFINITY;
  int used = 0;
  while (used < kShares) {
    for (int j = used; j < used + kBlock; j += kWidth) {
      const f64 rest = load(grid.rest + j), share = load(grid.share + j);
      f64 log_sum = load(grid.log_rest + j) * row.zeros, first = {}, second = {};
      for (int i = 0; i < row.size; ++i) {
        f64 inverse;
        log_sum += log_and_reciprocal(rest + share * odds[i], inverse) * row.count[i];
        // d ln(growth) / d ln m = still - 1, and d still / d ln m = still (1 - still)
        const f64 still = rest * inverse, part = still * row.count[i];
        first += part;
        second += part * still;
      }
      store(log_wealth + j, log_sum);
      store(slope + j, first - row.above);
      store(curvature + j, first - second);
    }
    for (int j = used; j < used + kBlock; ++j) largest = std::max(largest, log_wealth[j]);
    used += kBlock;
    // Concave in the share: once the wealth has fallen so far, it falls for good. Fewer terms are a smaller W.
    if (log_wealth[used - 1] < largest - kNegligible) break;
  }
  const double sum = weigh(log_wealth, largest, used, w);
  Wealth wealth;
  wealth.log = log_of(sum) + largest - grid.log_shares;
  wealth.slope = weighted(w, slope, used) / sum;
  for (int j = 0; j < used; ++j) {
    const double deviation = slope[j] - wealth.slope;
    curvature[j] += deviation * deviation;
  }
  wealth.curvature = weighted(w, curvature, used) / sum;
  return wealth;
}

// For m -> 0, ln W approaches from above the line with slope -above through this root, given as ln m.
static double root_of_asymptote(const Grid& grid, const Row& row) {
  alignas(64) double intercept[kShares], w[kShares];
  double largest = -INFINITY;
  for (int j = 0; j < kShares; ++j) {
    intercept[j] = row.above * grid.log_share[j] + row.zeros * grid.log_rest[j];
    largest = std::max(largest, intercept[j]);
  }
  const double line = log_of(weigh(intercept, largest, kShares, w)) + largest - grid.log_shares;
  double log_levels = -row.above * grid.log_level[row.levels];
  for (int i = 0; i < row.size; ++i) log_levels += row.count[i] * grid.log_level[static_cast<int>(row.level[i])];
  return (line + log_levels - grid.target) / row.above;
}

// Where the best share wins guessed_target, to third order in the distance from the sample mean; 0 if that fails.
// max over z of E ln(1 + z d) is about a^2 / 2 E[d^2] + a^3 E[d^3] / 3 E[d^2]^3, where d = value - m and a = E d.
static double guess(const Grid& grid, const Row& row) {
  double moment[4] = {};
  for (int i = 0; i < row.size; ++i) {
    double power = row.count[i];
    for (int k = 1; k < 4; ++k) moment[k] += power *= row.level[i];
  }
  double scale = row.total;
  for (int k = 1; k < 4; ++k) moment[k] /= scale *= row.levels;
  const double mean = moment[1], variance = std::max(moment[2] - mean * mean, 0.0);
  const double third = moment[3] - mean * (3 * moment[2] - 2 * mean * mean);
  const double wanted = grid.guessed_target / row.total;
  double a = std::sqrt(2 * wanted * variance);
  for (int round = 0; round < 3; ++round) {
    const double d2 = variance + a * a, d3 = third + a * (3 * variance + a * a);
    const double ratio = a / d2, won = ratio * (a / 2 + ratio * ratio * d3 / 3);
    if (!(won > 0)) return 0;
    a *= std::sqrt(wanted / won);
  }
  return a < mean ? mean - a : 0;
}

// The error of the computed ln W near the target, in absolute value. Of the terms c ln(growth): growth is off by 5 u,
// its logarithm by 20 u more, product and sum by L + 2. |ln growth| is at most ln 1/(1 - b) or, above level 0, ln 1/m.
// The last 10 u per sample pay for the rounding of the result, m exp(step): ln W moves by at most `above` per unit
// of ln m. Then the mean over shares: at most 31/e u from the rounding of exponents, 4 from exp, 31 from the sum,
// 140 from its logarithm and that of their number, and a few times |ln W|.
ROBATTR_INLINE double rounding_error(const Grid& grid, const Row& row, double log_mean) {
  const double largest_log = -grid.log_rest[kShares - 1];
  const double size = largest_log * row.total + std::max(-log_mean - largest_log, 0.0) * row.above;
  return 0x1p-53 * ((row.levels + 24) * size + 16 * row.total + 8 * grid.target + 200);
}

// The lower bound of one row with a sample above level 0.
static double lower_bound_of(const Grid& grid, const Row& row) {
  const double start = root_of_asymptote(grid, row);
  if (start <= kLogTiny) return 0;
  const double guessed = guess(grid, row);
  double x = guessed > 0 ? std::max(start, log_of(guessed)) : start;
  for (int step = 0; step < kMaxSteps; ++step) {
    const double m = exp_of(x), rounding = rounding_error(grid, row, x);
    const Wealth wealth = wealth_at(grid, row, m);
    // Twice: what is lost to rounding here, and through the slope by the step.
    const double excess = wealth.log - grid.target - 2 * rounding;
    const double newton = -excess / wealth.slope;
    const double lost = 0.5 * wealth.curvature * newton * newton;
    if (lost <= std::max(rounding, std::min(kLostWealth, kLostBound * -wealth.slope))) return m * exp_of(newton);
    // Newton's rule alone never fails, so it has the last word.
    const double bend = step < kHalleySteps ? 0.5 * wealth.curvature * newton / -wealth.slope : 0.0;
    x = std::max(x + newton / (1 - std::min(bend, 0.5)), start);
  }
  return exp_of(start - 4 * rounding_error(grid, row, start) / row.above);
}

// The lower bound of a row, or of one minus it (`mirrored`). zeros: its samples at level 0.
static double bound_of(const Grid& grid, const int32_t* counts, int levels, int64_t zeros, bool mirrored) {
  Row row;
  row.levels = levels;
  row.size = 0;
  row.above = 0;
  for (int l = 1; l <= levels; ++l) {
    const int64_t count = !mirrored ? counts[l - 1] : l < levels ? counts[levels - 1 - l] : zeros;
    if (count == 0) continue;
    row.count[row.size] = static_cast<double>(count);
    row.level[row.size++] = l;
    row.above += static_cast<double>(count);
  }
  row.zeros = static_cast<double>(mirrored ? counts[levels - 1] : zeros);
  row.total = row.zeros + row.above;
  return row.size == 0 ? 0 : lower_bound_of(grid, row);
}

// lower, upper: of the rows[begin .. end) of counts [n, levels], each with the same number of samples.
static void bound_rows(const Grid& grid, const int32_t* counts, int levels, int64_t samples, const int64_t* rows,
                       int64_t begin, int64_t end, double* lower, double* upper) {
  for (int64_t i = begin; i < end; ++i) {
    const int32_t* row = counts + rows[i] * levels;
    int64_t zeros = samples;
    for (int l = 0; l < levels; ++l) zeros -= row[l];
    lower[i] = bound_of(grid, row, levels, zeros, false);
    upper[i] = std::nextafter(1 - bound_of(grid, row, levels, zeros, true), 1.0);
  }
}
