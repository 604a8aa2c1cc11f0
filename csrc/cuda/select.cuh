// Exact selection in a row of scores by integer keys (common/float_key.h), one thread block or cluster per row.
//
// Sampled elements bound the k-th largest from both sides; one pass over the row counts what lies above the bounds and
// makes a histogram of what lies between them; further passes split the bin that holds the k-th largest until it is one
// key. A guess that proves wrong costs a pass, never a wrong result. A row lies in the shared memory of its cluster and
// is read from global memory once. Where that is too small, the row is read twice: candidates between the bounds are
// collected, and split in shared memory.
//
// The kernels that include this are compiled by nvcc and, in tests, by a C++ compiler (cuda/rt.cuh).
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/plan.h"
#include "cuda/rt.cuh"

namespace robattr_fast {

#include "common/float_key.h"

// Rows [images, samples, n] of any strides, in elements.
struct Rows {
  const void* data;
  int64_t count, samples;
  int64_t image_stride, sample_stride, stride;
};

struct Float32 {
  using Raw = int32_t;
  using Key = int32_t;
  ROBATTR_INLINE Key bits(Raw raw) { return raw; }
};

struct Float64 {
  using Raw = int64_t;
  using Key = int64_t;
  ROBATTR_INLINE Key bits(Raw raw) { return raw; }
};

struct BFloat16 {
  using Raw = uint16_t;
  using Key = int32_t;
  ROBATTR_INLINE Key bits(Raw raw) { return static_cast<int32_t>(static_cast<uint32_t>(raw) << 16); }
};

struct Float16 {
  using Raw = uint16_t;
  using Key = int32_t;
  // Exponent and fraction move into place; a multiplication by 2^(127 - 15), exact, mends the exponent, of denormals
  // too.
  ROBATTR_INLINE Key bits(Raw raw) {
    const uint32_t magnitude = (raw & 0x7FFFu) << 13, sign = (raw & 0x8000u) << 16;
    float value;
    memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    uint32_t result;
    memcpy(&result, &value, sizeof result);
    if (magnitude >= 0x0F800000u) result |= 0x7F800000u;
    return static_cast<int32_t>(result | sign);
  }
};

template <class Key>
struct Limits {
  static constexpr Key kBelowAll = std::is_same_v<Key, int32_t> ? INT32_MIN : static_cast<Key>(INT64_MIN);
  static constexpr Key kAboveAll = FloatBits<Key>::kNaN;
};

template <class T>
ROBATTR_INLINE T least(T a, T b) {
  return b < a ? b : a;
}

template <class T>
ROBATTR_INLINE T most(T a, T b) {
  return a < b ? b : a;
}

template <class T>
ROBATTR_INLINE T warp_sum(T value) {
  for (int mask = rt::kWarp / 2; mask > 0; mask /= 2) value += rt::shuffle_xor(value, mask);
  return value;
}

// A source is what select() looks through: `quads` groups of four keys, padded with keys below all others.

// One part of a row in global memory.
template <class Element>
struct GlobalRow {
  using Key = typename Element::Key;
  using Raw = typename Element::Raw;
  using RawQuad = rt::Quad<Raw>;

  const Raw* data;
  int64_t stride;
  int length, quads;
  bool aligned;  // four elements in one access

  ROBATTR_DEVICE GlobalRow(const Rows& rows, int64_t r, int first, int length_)
      : data(static_cast<const Raw*>(rows.data) + r / rows.samples * rows.image_stride +
             r % rows.samples * rows.sample_stride + first * rows.stride),
        stride(rows.stride),
        length(length_),
        quads((length_ + 7) / 8 * 2),
        aligned(rows.stride == 1 && reinterpret_cast<uintptr_t>(data) % alignof(RawQuad) == 0) {}

  ROBATTR_DEVICE static Key key(Raw raw) { return float_key<Key>(Element::bits(raw)); }
  ROBATTR_DEVICE Key key_at(int i) const { return key(data[i * stride]); }

  ROBATTR_DEVICE rt::Quad<Key> quad(int q) const {
    rt::Quad<Key> keys;
    if (aligned && 4 * q + 4 <= length) {
      RawQuad raw;
      if constexpr (sizeof(RawQuad) <= 16) {
        raw = rt::load_streaming(reinterpret_cast<const RawQuad*>(data) + q);
      } else {
        struct alignas(16) Half {
          Raw value[2];
        };
        const Half* halves = reinterpret_cast<const Half*>(data) + 2 * q;
        const Half low = rt::load_streaming(halves), high = rt::load_streaming(halves + 1);
        raw = {{low.value[0], low.value[1], high.value[0], high.value[1]}};
      }
      for (int j = 0; j < 4; ++j) keys.value[j] = key(raw.value[j]);
    } else {
      for (int j = 0; j < 4; ++j) keys.value[j] = 4 * q + j < length ? key_at(4 * q + j) : Limits<Key>::kBelowAll;
    }
    return keys;
  }
};

// Keys in the shared memory of this block.
template <class Key_>
struct SharedKeys {
  using Key = Key_;
  rt::Shared<Key> keys;
  int quads;
  ROBATTR_DEVICE rt::Quad<Key> quad(int q) const { return keys.load_quad(q); }
  ROBATTR_DEVICE Key key_at(int i) const { return keys.load(i); }
};

// f(q, keys) for every quad; the whole block calls f together, of quads past the last with padding.
// kAhead quads per thread are loaded before the first is used.
template <int kAhead, class Source, class F>
ROBATTR_INLINE void each_quad(const Source& source, const F& f) {
  using Key = typename Source::Key;
  const int step = rt::block_size();
#pragma unroll 1
  for (int base = 0; base < source.quads; base += kAhead * step) {
    rt::Quad<Key> keys[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int q = base + u * step + rt::thread_index();
      if (q < source.quads) {
        keys[u] = source.quad(q);
      } else {
        for (int j = 0; j < 4; ++j) keys[u].value[j] = Limits<Key>::kBelowAll;
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (base + u * step < source.quads) f(base + u * step + rt::thread_index(), keys[u]);
    }
  }
}

template <class Key>
struct Extremes {
  Key low, high;

  ROBATTR_DEVICE void include(Key key) {
    // padding is below all keys
    low = key == Limits<Key>::kBelowAll ? low : least(low, key);
    high = most(high, key);
  }
};

template <class Key>
ROBATTR_INLINE Extremes<Key> no_extremes() {
  return {Limits<Key>::kAboveAll, Limits<Key>::kBelowAll};
}

// The k-th largest of a row is the rank-th largest of its elements in [low, high]; `above` elements are larger than
// high. Once low == high, `population` elements equal it.
template <class Key>
struct Interval {
  Key low, high;
  int rank, above, population;
};

// What the threads of a cluster need to select together. All member functions are called by all of them, with the same
// arguments but for the source, of which each block holds a part.
template <class Key>
class Selector {
  using UKey = std::make_unsigned_t<Key>;

 public:
  ROBATTR_DEVICE explicit Selector(const Plan& plan)
      : plan_(plan),
        scan_(rt::dynamic_shared<int32_t>(plan.scan, kMaxWarps)),
        found_(rt::dynamic_shared<int32_t>(plan.scan + 4 * kMaxWarps, 8)) {
    // reduce(), which comes first, is a barrier between this and the first histogram
    for (int buffer = 0; buffer < 2; ++buffer) clear(buffer);
  }

  // Extremes over the cluster of what each thread has seen. Orders shared memory as cluster_sync does.
  ROBATTR_DEVICE Extremes<Key> reduce(Extremes<Key> own) {
    const rt::Shared<Key> slots = extremes(extremes_turn_);
    own = over_warp(own);
    if (rt::lane() == 0) {
      slots.store(2 * rt::warp(), own.low);
      slots.store(2 * rt::warp() + 1, own.high);
    }
    rt::cluster_sync();
    const int warps = rt::block_size() / rt::kWarp;
    Extremes<Key> all = no_extremes<Key>();
#pragma unroll 1
    for (int i = rt::lane(); i < rt::cluster_size() * warps; i += rt::kWarp) {
      const rt::Shared<Key> theirs = slots.map_shared_rank(i / warps);
      all.low = least(all.low, theirs.load(i % warps * 2));
      all.high = most(all.high, theirs.load(i % warps * 2 + 1));
    }
    extremes_turn_ ^= 1;
    return over_warp(all);
  }

  // x.low == x.high afterwards. If the row is sampled, a guess comes first; length: elements of this block's part.
  template <class Source>
  ROBATTR_DEVICE void select(const Source& source, int length, SampleRanks ranks, Interval<Key>& x) {
    if (plan_.sampled > 0 && x.low != x.high) {
      Key low = x.low, high = x.high;
      bracket(source, length, ranks, low, high);
      const int above = fill<true>(source, low, high);
      const Merged merged = merge();
      choose(merged.total, above, low, high, x);
      if (x.low == low && x.high == high) split(merged, x);
    }
    narrow(source, x);
  }

  // The same for a row that is not resident: x.low may be anything below the k-th largest, x.high is not read;
  // x.population is the number of elements. Returns the extremes of the row.
  template <class Source>
  ROBATTR_DEVICE Extremes<Key> select_streamed(const Source& source, int length, SampleRanks ranks, Interval<Key>& x) {
    Extremes<Key> sample = no_extremes<Key>();
#pragma unroll 1
    for (int j = rt::thread_index(); j < plan_.sampled; j += rt::block_size()) {
      sample.include(source.key_at(sampled_place(j, length)));
    }
    sample = reduce(sample);
    Key low = most(x.low, sample.low), high = most(low, sample.high);
    bracket(source, length, ranks, low, high);
    if (ranks.above == 0) high = Limits<Key>::kAboveAll;

    const rt::Shared<Key> list = rt::dynamic_shared<Key>(plan_.list, plan_.list_capacity);
    Extremes<Key> row = no_extremes<Key>();
    const int above = collect(source, low, high, list, row);
    const int stored = totals(turn_).load(1);
    row = reduce(row);
    x.low = most(x.low, row.low);
    x.high = row.high;
    next_turn();
    rt::sync_threads();
    choose(stored, above, low, high, x);
    if (x.low == low && x.high == high) {
      x.low = most(low, row.low);
      x.high = least(high, row.high);
      if (stored <= plan_.list_capacity) {
        narrow(SharedKeys<Key>{list, (stored + 3) / 4}, x);
        return row;
      }
    }
    narrow(source, x);
    return row;
  }

 private:
  struct Merged {
    int32_t count[4];   // of this thread's bins, the (4 t)-th and on
    int before, total;  // sum over the bins before them, over all
  };

  ROBATTR_DEVICE static Extremes<Key> over_warp(Extremes<Key> e) {
    for (int mask = rt::kWarp / 2; mask > 0; mask /= 2) {
      e.low = least(e.low, rt::shuffle_xor(e.low, mask));
      e.high = most(e.high, rt::shuffle_xor(e.high, mask));
    }
    return e;
  }

  ROBATTR_DEVICE int buffer_offset(int buffer) const { return plan_.exchange + buffer * plan_.exchange_bytes; }
  ROBATTR_DEVICE rt::Shared<int32_t> bins(int buffer) const {
    return rt::dynamic_shared<int32_t>(buffer_offset(buffer), plan_.bins);
  }
  ROBATTR_DEVICE rt::Shared<int32_t> totals(int buffer) const {
    return rt::dynamic_shared<int32_t>(buffer_offset(buffer) + 4 * plan_.bins, 4);
  }
  ROBATTR_DEVICE rt::Shared<Key> extremes(int buffer) const {
    return rt::dynamic_shared<Key>(buffer_offset(buffer) + 4 * plan_.bins + 16, 2 * kMaxWarps);
  }

  ROBATTR_DEVICE void clear(int buffer) const {
    const rt::Quad<int32_t> zeros = {};
    if (4 * rt::thread_index() < plan_.bins) bins(buffer).store_quad(rt::thread_index(), zeros);
    if (rt::thread_index() == 0) totals(buffer).store_quad(0, zeros);
  }

  // The buffers take turns: what other blocks may still be reading is cleared after the next cluster_sync.
  ROBATTR_DEVICE void next_turn() {
    turn_ ^= 1;
    clear(turn_);
  }

  // Where the j-th sample lies: one element at a random place in each of `sampled` equal parts.
  ROBATTR_DEVICE int sampled_place(int j, int length) const {
    const int first = static_cast<int>(static_cast<int64_t>(j) * length / plan_.sampled);
    const int end = static_cast<int>((static_cast<int64_t>(j) + 1) * length / plan_.sampled);
    const uint32_t random = (static_cast<uint32_t>(j) * 2654435761u + 40503u) * 2246822519u;
    return first + static_cast<int>(static_cast<uint64_t>(random) * static_cast<uint64_t>(end - first) >> 32);
  }

  ROBATTR_DEVICE int shift_of(Key low, Key high) const {
    const uint64_t range = static_cast<UKey>(high) - static_cast<UKey>(low);
    return most(0, __builtin_clzll(static_cast<uint64_t>(plan_.bins)) + 1 - __builtin_clzll(range | 1));
  }

  // Bin 0 holds the largest keys.
  ROBATTR_DEVICE static void count_key(rt::Shared<int32_t> bins, Key key, Key high, UKey range, int shift) {
    const UKey distance = static_cast<UKey>(high) - static_cast<UKey>(key);
    if (distance <= range) bins.atomic_add(static_cast<int>(distance >> shift), 1);
  }

  // A histogram of [low, high] into the bins of the cluster; with kAbove returns the number of keys above high.
  template <bool kAbove, class Source>
  ROBATTR_DEVICE int fill(const Source& source, Key low, Key high) {
    const rt::Shared<int32_t> mine = bins(turn_);
    const UKey range = static_cast<UKey>(high) - static_cast<UKey>(low);
    const int shift = shift_of(low, high);
    int above = 0;
    each_quad<1>(source, [&](int, const rt::Quad<Key>& keys) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (kAbove) above += keys.value[j] > high;
        count_key(mine, keys.value[j], high, range, shift);
      }
    });
    if (kAbove) {
      above = warp_sum(above);
      if (rt::lane() == 0) totals(turn_).atomic_add(0, above);
    }
    rt::cluster_sync();
    return kAbove ? sum_of_totals() : 0;
  }

  ROBATTR_DEVICE int sum_of_totals() const {
    int sum = 0;
#pragma unroll 1
    for (int rank = 0; rank < rt::cluster_size(); ++rank) sum += totals(turn_).map_shared_rank(rank).load(0);
    return sum;
  }

  // Adds up the bins of all blocks; afterwards the other buffer is ready.
  ROBATTR_DEVICE Merged merge() {
    Merged merged = {};
    if (4 * rt::thread_index() < plan_.bins) {
      for (int rank = 0; rank < rt::cluster_size(); ++rank) {
        const rt::Quad<int32_t> theirs = bins(turn_).map_shared_rank(rank).load_quad(rt::thread_index());
        for (int j = 0; j < 4; ++j) merged.count[j] += theirs.value[j];
      }
    }
    next_turn();
    const int own = merged.count[0] + merged.count[1] + merged.count[2] + merged.count[3];
    int inclusive = own;
    for (int distance = 1; distance < rt::kWarp; distance *= 2) {
      const int left = rt::shuffle_up(inclusive, distance);
      if (rt::lane() >= distance) inclusive += left;
    }
    if (rt::lane() == rt::kWarp - 1) scan_.store(rt::warp(), inclusive);
    rt::sync_threads();
    merged.before = inclusive - own;
#pragma unroll 1
    for (int w = 0; w < rt::block_size() / rt::kWarp; ++w) {
      const int sum = scan_.load(w);
      merged.total += sum;
      if (w < rt::warp()) merged.before += sum;
    }
    return merged;
  }

  // The thread that holds the bin of this rank, 1 <= rank <= merged.total, writes it down: bin, elements before it,
  // elements in it.
  ROBATTR_DEVICE void publish(const Merged& merged, int rank, int slot) const {
    int before = merged.before;
    for (int j = 0; j < 4; ++j) {
      if (rank > before && rank <= before + merged.count[j]) {
        found_.store(4 * slot, 4 * rt::thread_index() + j);
        found_.store(4 * slot + 1, before);
        found_.store(4 * slot + 2, merged.count[j]);
      }
      before += merged.count[j];
    }
  }

  // Bounds within [low, high] between which the element in question probably lies.
  template <class Source>
  ROBATTR_DEVICE void bracket(const Source& source, int length, SampleRanks ranks, Key& low, Key& high) {
    const rt::Shared<int32_t> mine = bins(turn_);
    const UKey range = static_cast<UKey>(high) - static_cast<UKey>(low);
    const int shift = shift_of(low, high);
#pragma unroll 1
    for (int j = rt::thread_index(); j < plan_.sampled; j += rt::block_size()) {
      count_key(mine, source.key_at(sampled_place(j, length)), high, range, shift);
    }
    rt::cluster_sync();
    const Merged merged = merge();
    // Fewer samples than ranks.above: whatever is sought lies near low.
    const int rank_above = least(ranks.above, merged.total);
    if (rank_above > 0) publish(merged, rank_above, 0);
    if (ranks.below <= merged.total) publish(merged, ranks.below, 1);
    rt::sync_threads();
    const UKey largest = static_cast<UKey>(high);
    if (rank_above > 0) high = static_cast<Key>(largest - (static_cast<UKey>(found_.load(0)) << shift));
    if (ranks.below <= merged.total) {
      const UKey below = ((static_cast<UKey>(found_.load(4)) + 1) << shift) - 1;
      if (below < range) low = static_cast<Key>(largest - below);
    }
  }

  // Narrows x to [low, high], which holds `inside` elements and has `above` above it, or to what lies beside it.
  ROBATTR_DEVICE static void choose(int inside, int above, Key low, Key high, Interval<Key>& x) {
    if (x.rank <= above) {
      x.low = high + 1;
      x.population = above;
    } else if (x.rank <= above + inside) {
      x = {low, high, x.rank - above, above, inside};
    } else {
      x.high = low - 1;
      x.rank -= above + inside;
      x.above = above + inside;
      x.population -= above + inside;
    }
  }

  // Narrows x to one bin of its histogram.
  ROBATTR_DEVICE void split(const Merged& merged, Interval<Key>& x) const {
    publish(merged, x.rank, 0);
    rt::sync_threads();
    const int shift = shift_of(x.low, x.high);
    const UKey top = static_cast<UKey>(x.high) - (static_cast<UKey>(found_.load(0)) << shift);
    const UKey width = (UKey{1} << shift) - 1;
    if (top - static_cast<UKey>(x.low) > width) x.low = static_cast<Key>(top - width);
    x.high = static_cast<Key>(top);
    x.above += found_.load(1);
    x.rank -= found_.load(1);
    x.population = found_.load(2);
  }

  template <class Source>
  ROBATTR_DEVICE void narrow(const Source& source, Interval<Key>& x) {
    while (x.low != x.high) {
      fill<false>(source, x.low, x.high);
      split(merge(), x);
    }
  }

  // Appends the keys in [low, high] to the list, as far as they fit; totals hold their number. Returns the number
  // above.
  template <class Source>
  ROBATTR_DEVICE int collect(const Source& source, Key low, Key high, rt::Shared<Key> list, Extremes<Key>& row) {
    const rt::Shared<int32_t> sums = totals(turn_);
    int above = 0;
    each_quad<4>(source, [&](int, const rt::Quad<Key>& keys) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Key key = keys.value[j];
        row.include(key);
        above += key > high;
        const bool inside = key >= low && key <= high;
        const uint32_t lanes = rt::ballot(inside);
        if (lanes == 0) continue;
        int first = 0;
        if (rt::lane() == 0) first = sums.atomic_add(1, __builtin_popcount(lanes));
        first = rt::shuffle(first, 0);
        const int place = first + __builtin_popcount(lanes & ((1u << rt::lane()) - 1));
        if (inside && place < plan_.list_capacity) list.store(place, key);
      }
    });
    above = warp_sum(above);
    if (rt::lane() == 0) sums.atomic_add(0, above);
    rt::sync_threads();
    // padding up to a whole quad
    const int stored = sums.load(1), place = stored + rt::thread_index();
    if (rt::thread_index() < 3 && place < (stored + 3) / 4 * 4 && place < plan_.list_capacity) {
      list.store(place, Limits<Key>::kBelowAll);
    }
    return sums.load(0);
  }

  const Plan& plan_;
  rt::Shared<int32_t> scan_, found_;
  int turn_ = 0, extremes_turn_ = 0;
};

// Elements of the row that this block holds: [first, first + length).
struct Part {
  int first, length;
};

ROBATTR_INLINE Part part_of_block(const Plan& plan) {
  const int first = rt::cluster_rank() * plan.part;
  return {first, most(0, least(plan.part, plan.n - first))};
}

// Loads the part of a row into shared memory. Returns the extremes of the whole row.
template <class Element, class Key = typename Element::Key>
ROBATTR_INLINE Extremes<Key> load_row(const GlobalRow<Element>& from, const SharedKeys<Key>& to,
                                      Selector<Key>& selector) {
  Extremes<Key> extremes = no_extremes<Key>();
  each_quad<4>(from, [&](int q, const rt::Quad<Key>& keys) {
    if (q >= from.quads) return;
    for (int j = 0; j < 4; ++j) extremes.include(keys.value[j]);
    to.keys.store_quad(q, keys);
  });
  return selector.reduce(extremes);
}

// One row, wherever it lies. kResident: in shared memory, else it is read anew at every pass.
template <class Element, bool kResident>
class RowReader {
  using Key = typename Element::Key;

 public:
  ROBATTR_DEVICE explicit RowReader(const Plan& plan)
      : selector_(plan),
        shared_{kResident ? rt::dynamic_shared<Key>(plan.row, plan.part) : rt::Shared<Key>(), 0},
        part_(part_of_block(plan)),
        n_(plan.n) {}

  ROBATTR_DEVICE Part part() const { return part_; }

  // The k-th largest of row r, and the extremes of the row.
  ROBATTR_DEVICE Interval<Key> select(const Rows& rows, int64_t r, int k, SampleRanks ranks, Extremes<Key>& extremes) {
    const GlobalRow<Element> row(rows, r, part_.first, part_.length);
    Interval<Key> x{Limits<Key>::kBelowAll, Limits<Key>::kAboveAll, k, 0, n_};
    if constexpr (kResident) {
      shared_.quads = row.quads;
      extremes = load_row(row, shared_, selector_);
      x.low = extremes.low;
      x.high = extremes.high;
      selector_.select(shared_, part_.length, ranks, x);
    } else {
      extremes = selector_.select_streamed(row, part_.length, ranks, x);
    }
    return x;
  }

  // The k-th largest of the same row, k being at most that of the threshold found before.
  ROBATTR_DEVICE Interval<Key> select_above(const Rows& rows, int64_t r, int k, SampleRanks ranks,
                                            const Extremes<Key>& extremes, const Interval<Key>& threshold) {
    Interval<Key> x{threshold.low, extremes.high, k, 0, threshold.above + threshold.population};
    if constexpr (kResident) {
      selector_.select(shared_, part_.length, ranks, x);
    } else {
      selector_.select_streamed(GlobalRow<Element>(rows, r, part_.first, part_.length), part_.length, ranks, x);
    }
    return x;
  }

  template <class F>
  ROBATTR_DEVICE void each(const Rows& rows, int64_t r, const F& f) const {
    if constexpr (kResident) {
      each_quad<1>(shared_, f);
    } else {
      each_quad<4>(GlobalRow<Element>(rows, r, part_.first, part_.length), f);
    }
  }

 private:
  Selector<Key> selector_;
  SharedKeys<Key> shared_;
  Part part_;
  int n_;
};

// Blocks that run on a multiprocessor at once: one loads while the other selects. What would spill registers runs
// alone.
template <class Element, bool kResident>
constexpr int kResidentBlocks = kResident && sizeof(typename Element::Key) == 4 ? 2 : 1;

// Rows [begin, end) of this cluster.
struct RowRange {
  int64_t begin, end;
};

ROBATTR_INLINE RowRange rows_of_cluster(int64_t rows) {
  const int64_t clusters = rt::grid_size() / rt::cluster_size(), cluster = rt::block_index() / rt::cluster_size();
  return {cluster * rows / clusters, (cluster + 1) * rows / clusters};
}

}  // namespace robattr_fast
