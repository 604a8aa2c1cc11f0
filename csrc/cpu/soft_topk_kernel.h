// Soft top-k of rows [begin, end); definition: robattr_fast/reference/soft_topk.py. Compiled once per instruction set
// (foreach_isa.h); lanes and the order of sums do not depend on it.
//
// With the k-th largest score as pivot, x_i = (s_i - pivot) / T - y, and y is sought. The pivot keeps y small wherever
// a sigmoid is not yet 0 or 1: between -(kFar + 1), where the k largest are 1, and ln(n - k + 1), where those from the
// pivot down sum to less than 1. With q = sigmoid(-|x|) the sum of h exceeds k by
//   (below + max(count - k, 0)) - (above + max(k - count, 0)),
// count the number of x >= 0, above and below the sums of q over these and over the others: nothing cancels. The
// logarithms of the two sides are nearly straight lines in y both where T is large and where it is small: Newton's
// method finds where they meet in a few steps, kept inside of a bracket.

#include "cpu/select.h"

// Sixteen floats or eight doubles in every instruction set, whatever its registers hold: the order of sums is theirs.
namespace wide {

constexpr int kBytes = 64;
typedef float f32 __attribute__((vector_size(kBytes)));
typedef int32_t i32 __attribute__((vector_size(kBytes)));
typedef double f64 __attribute__((vector_size(kBytes)));
typedef int64_t i64 __attribute__((vector_size(kBytes)));
typedef uint64_t u64 __attribute__((vector_size(kBytes)));

#include "common/log64.h"

// exp x for x in [-87, 0]: exp64 of common/log64.h in float32, to 3 units of 2^-24.
ROBATTR_INLINE f32 exp32(f32 x) {
  const f32 rounded = x * 0x1.715476p+0f + 0x1.8p23f;
  const f32 k = rounded - 0x1.8p23f;
  const f32 r = (x - k * 0x1.62e4p-1f) - k * 0x1.7f7d1cp-20f;
  f32 p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (f32)((i32)p + ((i32)rounded << 23));
}

ROBATTR_INLINE f32 exponential(f32 x) { return exp32(x); }
ROBATTR_INLINE f64 exponential(f64 x) { return exp64(x); }

template <class Key>
struct Sigmoid;

// kFar: exp(-kFar) is still a normal number; a sigmoid that lies farther out counts as 0 or 1. A Newton step of e
// leaves about e^2: below kSettled that is rounding.
template <>
struct Sigmoid<int32_t> {
  using Vector = f32;
  using Bits = i32;
  static constexpr float kFar = 87;
  static constexpr int kExponents = 250;  // of T: differences of floats, over more, are 0 or infinite all the same
  static constexpr double kSettled = 1e-4;
};

template <>
struct Sigmoid<int64_t> {
  using Vector = f64;
  using Bits = i64;
  static constexpr double kFar = 708;
  static constexpr int kExponents = 1074;
  static constexpr double kSettled = 3e-9;
};

// x_i = (s_i shrink - pivot) factor[0] factor[1] - y. Two factors, since 1/T may overflow; scores are shrunk where T
// is large, since then their differences may.
template <class Key>
struct Ruler {
  using Float = typename FloatBits<Key>::Float;
  Float shrink, pivot, factor[2];

  Ruler(Float pivot_score, double temperature) {
    int exponent;
    const double mantissa = std::frexp(temperature, &exponent);
    exponent = std::clamp(exponent, -Sigmoid<Key>::kExponents, Sigmoid<Key>::kExponents);
    shrink = exponent > 0 ? Float{0.25} : Float{1};
    if (exponent > 0) exponent -= 2;
    pivot = pivot_score * shrink;
    factor[0] = static_cast<Float>(std::ldexp(1 / mantissa, -exponent / 2));
    factor[1] = static_cast<Float>(std::ldexp(1.0, -(exponent - exponent / 2)));
  }
};

template <class Key>
constexpr int kFloats = 64 / sizeof(Key);

// Up to `count` scores; those past the end are -inf, of which sigmoids are 0.
template <class Key>
ROBATTR_INLINE typename Sigmoid<Key>::Vector load_scores(const Key* bits, int64_t count) {
  using Vector = typename Sigmoid<Key>::Vector;
  using Float = typename FloatBits<Key>::Float;
  Vector v = Vector{} - std::numeric_limits<Float>::infinity();
  std::memcpy(&v, bits, count < kFloats<Key> ? count * sizeof(Key) : sizeof v);
  return v;
}

// q = sigmoid(-|x|), and all bits of `negative` where x < 0.
template <class Key>
ROBATTR_INLINE typename Sigmoid<Key>::Vector smaller_share(typename Sigmoid<Key>::Vector s, const Ruler<Key>& ruler,
                                                           typename FloatBits<Key>::Float y,
                                                           typename Sigmoid<Key>::Bits& negative) {
  using S = Sigmoid<Key>;
  using Vector = typename S::Vector;
  using Bits = typename S::Bits;
  const Vector x = (s * ruler.shrink - ruler.pivot) * ruler.factor[0] * ruler.factor[1] - y;
  negative = (Bits)x >> FloatBits<Key>::kSign;
  const Bits size = (Bits)x & FloatBits<Key>::kNaN;
  Key far_bits;
  std::memcpy(&far_bits, &S::kFar, sizeof far_bits);
  const Bits near = (size - far_bits) >> FloatBits<Key>::kSign;
  const Vector e = (Vector)((Bits)exponential(-(Vector)(size & near)) & near);
  return e / (e + 1);
}

struct Shares {
  int64_t count = 0;                        // of x >= 0
  double above = 0, below = 0;              // sums of q: over these, over the others
  double above_slope = 0, below_slope = 0;  // of q (1 - q)
};

template <class Key>
static Shares shares_at(const Key* bits, int64_t n, const Ruler<Key>& ruler, typename FloatBits<Key>::Float y) {
  using Vector = typename Sigmoid<Key>::Vector;
  using Bits = typename Sigmoid<Key>::Bits;
  constexpr int64_t kBlock = 32 * kFloats<Key>;
  Shares shares;
  int64_t negatives = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t end = std::min(first + kBlock, n);
    Vector above{}, below{}, above_slope{}, below_slope{};
    Bits counted{};
    for (int64_t i = first; i < end; i += kFloats<Key>) {
      Bits negative;
      const Vector q = smaller_share(load_scores(bits + i, n - i), ruler, y, negative);
      const Vector slope = q - q * q;
      above += (Vector)((Bits)q & ~negative);
      below += (Vector)((Bits)q & negative);
      above_slope += (Vector)((Bits)slope & ~negative);
      below_slope += (Vector)((Bits)slope & negative);
      counted -= negative;
    }
    for (int lane = 0; lane < kFloats<Key>; ++lane) {
      shares.above += above[lane];
      shares.below += below[lane];
      shares.above_slope += above_slope[lane];
      shares.below_slope += below_slope[lane];
      negatives += counted[lane];
    }
  }
  const int64_t padding = (kFloats<Key> - n % kFloats<Key>) % kFloats<Key>;
  shares.count = n - (negatives - padding);
  return shares;
}

// The mean of a row, infinite where its sum overflows; false where the row holds NaN or inf.
template <class Key>
static bool finite_mean(const Key* bits, int64_t n, double& mean) {
  using Vector = typename Sigmoid<Key>::Vector;
  using Bits = typename Sigmoid<Key>::Bits;
  Vector sum{};
  Bits nonfinite{};
  int64_t i = 0;
  for (; i + kFloats<Key> <= n; i += kFloats<Key>) {
    const Vector v = load_scores(bits + i, kFloats<Key>);
    sum += v;
    nonfinite |= nonfinite_sign<Key>((Bits)v);
  }
  mean = 0;
  bool finite = true;
  for (int lane = 0; lane < kFloats<Key>; ++lane) {
    mean += sum[lane];
    finite &= nonfinite[lane] >= 0;
  }
  for (; i < n; ++i) {
    typename FloatBits<Key>::Float value;
    std::memcpy(&value, bits + i, sizeof value);
    mean += value;
    finite &= std::isfinite(value);
  }
  mean /= static_cast<double>(n);
  return finite;
}

// The y at which the sigmoids sum to k; mean is that of the scores.
template <class Key>
static double solve(const Key* bits, int64_t n, int64_t k, double temperature, double pivot, double mean,
                    const Ruler<Key>& ruler) {
  using Float = typename FloatBits<Key>::Float;
  double low = -(Sigmoid<Key>::kFar + 1.0), high = std::log(static_cast<double>(n - k + 1));
  // nu is a quantile of score + T * logistic noise. Its distance from the mean is guessed from those of the two parts
  // alone, as if they were normal: exact where T is small, where it is large, and for equal scores.
  const double logistic = std::log(static_cast<double>(n - k)) - std::log(static_cast<double>(k));
  double offset = (pivot - mean) / temperature;
  offset = std::isfinite(offset) ? std::clamp(offset, -1e15, 1e15) : 0;
  const double both = std::sqrt(offset * offset + logistic * logistic);
  double y = std::copysign(both, std::abs(offset) > std::abs(logistic) ? offset : logistic) - offset;
  y = std::clamp(y, low, high);

  double last_step = high - low;
  while (true) {
    const Shares s = shares_at(bits, n, ruler, static_cast<Float>(y));
    const double many = s.below + static_cast<double>(std::max<int64_t>(s.count - k, 0));
    const double few = s.above + static_cast<double>(std::max<int64_t>(k - s.count, 0));
    if (many == few) return y;
    (many > few ? low : high) = y;
    double next = y + std::log(many / few) / (s.below_slope / many + s.above_slope / few);
    // Not where a side is 0 (then next is no number), and not where steps do not shrink.
    const bool newton = next > low && next < high && std::abs(next - y) < 0.5 * last_step;
    if (!newton) next = 0.5 * (low + high);
    if (next <= low || next >= high || high - low <= std::numeric_limits<Float>::epsilon()) return y;
    last_step = std::abs(next - y);
    y = next;
    if (last_step <= Sigmoid<Key>::kSettled && newton) return y;
  }
}

// out [rows, n]; nu = pivots[r] + T offsets[r].
template <class Key>
static void soft_topk_rows(const Rows& rows, int64_t begin, int64_t end, int64_t k, double temperature,
                           typename FloatBits<Key>::Float* out, typename FloatBits<Key>::Float* pivots,
                           double* offsets) {
  using Float = typename FloatBits<Key>::Float;
  using Vector = typename Sigmoid<Key>::Vector;
  using Bits = typename Sigmoid<Key>::Bits;
  auto& scratch = Scratch<Key>::of_thread(rows.n);
  for (int64_t r = begin; r < end; ++r) {
    Float* row = out + r * rows.n;
    const Key* bits = row_bits(rows, r, scratch);
    double mean;
    if (!finite_mean(bits, rows.n, mean)) {
      std::fill(row, row + rows.n, std::numeric_limits<Float>::quiet_NaN());
      pivots[r] = std::numeric_limits<Float>::quiet_NaN();
      offsets[r] = std::numeric_limits<double>::quiet_NaN();
      continue;
    }
    const Key pivot_bits = float_bits(select_threshold(bits, rows.n, k, scratch));
    Float pivot;
    std::memcpy(&pivot, &pivot_bits, sizeof pivot);
    const Ruler<Key> ruler(pivot, temperature);
    const double y = solve(bits, rows.n, k, temperature, pivot, mean, ruler);
    pivots[r] = pivot;
    offsets[r] = y;
    for (int64_t i = 0; i < rows.n; i += kFloats<Key>) {
      Bits negative;
      const Vector q = smaller_share(load_scores(bits + i, rows.n - i), ruler, static_cast<Float>(y), negative);
      const Vector h = (Vector)(((Bits)q & negative) | ((Bits)(1 - q) & ~negative));
      std::memcpy(row + i, &h, std::min<int64_t>(rows.n - i, kFloats<Key>) * sizeof(Float));
    }
  }
}

}  // namespace wide
