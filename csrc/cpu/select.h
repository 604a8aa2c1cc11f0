// Exact selection in a row of scores, by integer keys (common/float_key.h). Compiled once per instruction set
// (foreach_isa.h): no include guard.
//
// A random sample of the row bounds the threshold from below; one pass over the row keeps what lies above that bound;
// everything else happens among these candidates. A bound that proves too high costs a second pass, never a wrong
// result. Ties at the bound are only counted, so that rows of few distinct values are no slower than others.

#include "common/float_key.h"
#include "common/level_edges.h"
#include "cpu/compress.h"

template <class Key>
ROBATTR_INLINE Key load_bits(const Key* bits) {
  Key value;
  std::memcpy(&value, bits, sizeof value);
  return value;
}

// The bits of row r as float or double; rows of another type or stride are converted into the scratch.
template <class Key>
static const Key* row_bits(const Rows& rows, int64_t r, Scratch<Key>& scratch) {
  if constexpr (sizeof(Key) == 8) {
    if (rows.stride == 1) return rows.row<Key>(r);
    const Key* row = rows.row<Key>(r);
    for (int64_t i = 0; i < rows.n; ++i) scratch.converted[i] = load_bits(row + i * rows.stride);
  } else {
    if (rows.stride == 1 && rows.type == ScalarType::Float) return rows.row<Key>(r);
    if (rows.stride == 1 && rows.type == ScalarType::BFloat16) {
      const uint16_t* row = rows.row<uint16_t>(r);
      for (int64_t i = 0; i < rows.n; ++i) scratch.converted[i] = static_cast<int32_t>(row[i]) << 16;
      return scratch.converted.get();
    }
    dispatch_float(rows.type, [&](auto tag) {
      using T = decltype(tag);
      const T* row = rows.row<T>(r);
      int64_t i = 0;
#if ROBATTR_ISA != ROBATTR_ISA_BASELINE
      if (rows.stride == 1 && std::is_same_v<T, c10::Half>) {
        for (; i + 8 <= rows.n; i += 8) {
          const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
          _mm256_storeu_ps(reinterpret_cast<float*>(&scratch.converted[i]), _mm256_cvtph_ps(halves));
        }
      }
#endif
      for (; i < rows.n; ++i) {
        const float value = static_cast<float>(row[i * rows.stride]);
        std::memcpy(&scratch.converted[i], &value, sizeof value);
      }
    });
  }
  return scratch.converted.get();
}

struct Collected {
  int64_t above, equal;  // elements above the bound, elements at it
  bool finite;
};

// Appends key (and index, if asked for) of every element above the bound to the scratch, in the order of the row.
template <bool kIndex, class Key>
static Collected collect(const Key* bits, int64_t n, Key bound, Scratch<Key>& scratch) {
  using V = Vector<Key>;
  Key* keys = scratch.keys.get();
  uint32_t* index = scratch.index.get();
  constexpr int kPrefetch = 2048;  // bytes ahead
  const V bounds = V{} + bound;
  V nonfinite = {};
  int64_t above = 0, equal = 0;
  const auto block = [&](V v, int64_t i, uint32_t lanes) {
    nonfinite |= nonfinite_sign<Key>(v);
    const V key = float_key<Key>(v);
    const uint32_t mask = greater<Key>(key, bounds) & lanes;
    equal += count_bits(equals<Key>(key, bounds) & lanes);
    if constexpr (kIndex) {
      compress_companion<Key>(index + above, companion_iota<Key>() + static_cast<uint32_t>(i), mask);
    }
    above += compress(keys + above, key, mask);
  };
  int64_t i = 0;
  for (; i + kWidth<Key> <= n; i += kWidth<Key>) {
    __builtin_prefetch(bits + i + kPrefetch / sizeof(Key));
    block(load_vector(bits + i), i, first_lanes<Key>(kWidth<Key>));
  }
  if (i < n) {
    V tail = {};
    std::memcpy(&tail, bits + i, (n - i) * sizeof(Key));
    block(tail, i, first_lanes<Key>(n - i));
  }
  return {above, equal, greater<Key>(V{}, nonfinite) == 0};
}

// The k-th largest of keys[0, n), 1 <= k <= n: a histogram over their range, then the same within the bin that holds
// it. keys stay; keys may be read, not written, up to kPadding elements past n.
template <class Key>
static Key kth_largest(const Key* keys, int64_t n, int64_t k, Scratch<Key>& scratch) {
  using UKey = std::make_unsigned_t<Key>;
  using V = Vector<Key>;
  Key* work = scratch.work.get();
  while (n > 2 * kWidth<Key>) {
    V low = load_vector(keys), high = low;
    for (int64_t i = kWidth<Key>; i + kWidth<Key> <= n; i += kWidth<Key>) {
      const V v = load_vector(keys + i);
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    const V last = load_vector(keys + n - kWidth<Key>);
    low = last < low ? last : low;
    high = last > high ? last : high;
    Key smallest = low[0], largest = high[0];
    for (int lane = 1; lane < kWidth<Key>; ++lane) {
      smallest = std::min<Key>(smallest, low[lane]);
      largest = std::max<Key>(largest, high[lane]);
    }
    if (smallest == largest) return largest;

    // Bin 0 holds the largest keys.
    const UKey range = static_cast<UKey>(largest) - static_cast<UKey>(smallest);
    const int bin_bits = std::clamp(static_cast<int>(std::bit_width(static_cast<uint64_t>(n))) - 2, 5, kMaxBinBits);
    const int shift = std::max(0, static_cast<int>(std::bit_width(range)) - bin_bits);
    const int bins = static_cast<int>(range >> shift) + 1;
    // Two histograms: equal keys in a row would otherwise wait for each other's increment.
    uint32_t* even = scratch.histogram[0];
    uint32_t* odd = scratch.histogram[1];
    std::memset(even, 0, bins * sizeof *even);
    std::memset(odd, 0, bins * sizeof *odd);
    const auto bin_of = [&](Key key) { return (static_cast<UKey>(largest) - static_cast<UKey>(key)) >> shift; };
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
      ++even[bin_of(keys[i])];
      ++odd[bin_of(keys[i + 1])];
    }
    if (i < n) ++even[bin_of(keys[i])];
    int bin = 0;
    while (k > even[bin] + odd[bin]) {
      k -= even[bin] + odd[bin];
      ++bin;
    }
    const Key top = static_cast<Key>(static_cast<UKey>(largest) - (static_cast<UKey>(bin) << shift));
    if (shift == 0) return top;
    // Keep the keys in (bottom, top].
    const UKey below = (static_cast<UKey>(bin) + 1) << shift;
    const Key bottom = bin + 1 == bins ? smallest - 1 : static_cast<Key>(static_cast<UKey>(largest) - below);
    const V bottoms = V{} + bottom, tops = V{} + top;
    int64_t kept = 0;
    for (i = 0; i < n; i += kWidth<Key>) {
      const V v = load_vector(keys + i);
      const uint32_t inside = greater<Key>(v, bottoms) & ~greater<Key>(v, tops);
      kept += compress(work + kept, v, inside & first_lanes<Key>(n - i));
    }
    keys = work;
    n = kept;
  }
  Key sorted[2 * kWidth<Key>];
  std::copy(keys, keys + n, sorted);
  std::nth_element(sorted, sorted + (k - 1), sorted + n, std::greater<Key>());
  return sorted[k - 1];
}

// A key that the k-th largest of the row reaches in all but a few of 100000 rows; below all keys where a sample
// cannot tell. One element at a random place in each of kSamples equal parts of the row.
template <class Key>
static Key lower_bound_of_kth(const Key* bits, int64_t n, int64_t k, Scratch<Key>& scratch) {
  constexpr int64_t kShortestRow = 8 * kSamples;
  constexpr double kDeviations = 4;
  constexpr Key kBelowAll = std::numeric_limits<Key>::min();
  if (n < kShortestRow) return kBelowAll;
  const double share = static_cast<double>(k) / static_cast<double>(n);
  const int64_t rank =
      static_cast<int64_t>(kSamples * share + kDeviations * std::sqrt(kSamples * share * (1 - share))) + 2;
  if (rank > kSamples) return kBelowAll;
  uint32_t state = 1;
  for (int64_t j = 0; j < kSamples; ++j) {
    const int64_t first = j * n / kSamples, length = (j + 1) * n / kSamples - first;
    state = state * 1664525u + 1013904223u;
    scratch.sample[j] = float_key<Key>(load_bits(bits + first + (static_cast<uint64_t>(state) * length >> 32)));
  }
  return kth_largest(scratch.sample, kSamples, rank, scratch);
}

// Key of the k-th largest element of a row.
template <class Key>
static Key select_threshold(const Key* bits, int64_t n, int64_t k, Scratch<Key>& scratch) {
  Key bound = lower_bound_of_kth(bits, n, k, scratch);
  Collected c = collect<false>(bits, n, bound, scratch);
  if (k > c.above + c.equal) {
    bound = std::numeric_limits<Key>::min();
    c = collect<false>(bits, n, bound, scratch);
  }
  return k <= c.above ? kth_largest(scratch.keys.get(), c.above, k, scratch) : bound;
}

template <class Key>
struct Support {
  int64_t size;  // scratch.keys and scratch.index hold this many elements, in the order of the row
  Key g;         // key of max(s_[k_gamma], 0); 0 unless asked for
  bool finite;   // false: the row holds NaN or inf, and nothing else is set
};

// The support of the sparsified map (reference/sparsify.py); k_gamma = 0 if g is not needed.
template <class Key>
static Support<Key> select_support(const Key* bits, int64_t n, int64_t k_tau, int64_t k_gamma, Scratch<Key>& scratch) {
  // Only positive elements can be selected: with bound 0 too few candidates mean that all of them are.
  Key bound = std::max<Key>(lower_bound_of_kth(bits, n, k_tau, scratch), 0);
  Collected c = collect<true>(bits, n, bound, scratch);
  if (!c.finite) return {0, 0, false};
  if (bound > 0 && k_tau > c.above) {
    if (k_tau > c.above + c.equal) {
      c = collect<true>(bits, n, bound = 0, scratch);
    } else if (k_tau == c.above + c.equal) {
      c = collect<true>(bits, n, --bound, scratch);  // the threshold is the bound, and all ties fit
    }
  }
  Key* keys = scratch.keys.get();
  uint32_t* index = scratch.index.get();
  const Key g = k_gamma == 0 ? 0 : k_gamma <= c.above ? kth_largest(keys, c.above, k_gamma, scratch) : bound;
  if (k_tau >= c.above) return {c.above, g, true};

  using V = Vector<Key>;
  Key cut = kth_largest(keys, c.above, k_tau, scratch) - 1;  // keys above it are selected
  int64_t reach = 0;
  for (int64_t i = 0; i < c.above; i += kWidth<Key>) {
    reach += count_bits(greater<Key>(load_vector(keys + i), V{} + cut) & first_lanes<Key>(c.above - i));
  }
  if (reach > k_tau) ++cut;  // not all ties fit
  int64_t size = 0;
  for (int64_t i = 0; i < c.above; i += kWidth<Key>) {
    const V v = load_vector(keys + i);
    const uint32_t mask = greater<Key>(v, V{} + cut) & first_lanes<Key>(c.above - i);
    compress_companion<Key>(index + size, load_companion<Key>(index + i), mask);
    size += compress(keys + size, v, mask);
  }
  return {size, g, true};
}

// The keys of g * (l / L), l = 0..L-1.
template <class Key>
static void level_edges(Key g, int levels, Key* edges) {
  for (int l = 0; l < levels; ++l) edges[l] = level_edge(g, l, levels);
}

// level[i] = number of edges below keys[i], for i < size; stores up to kPadding elements past it.
template <class Key>
static void levels_of(const Key* keys, int64_t size, const Key* edges, int levels, uint32_t* level) {
  using V = Vector<Key>;
  for (int64_t i = 0; i < size; i += kWidth<Key>) {
    const V v = load_vector(keys + i);
    V sum = {};
    for (int l = 0; l < levels; ++l) sum -= v > edges[l];
    for (int lane = 0; lane < kWidth<Key>; ++lane) level[i + lane] = static_cast<uint32_t>(sum[lane]);
  }
}
