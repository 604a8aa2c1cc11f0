// csrc/cuda/rt.cuh for a CPU: the same names, executed and watched by host_cuda/machine.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

#define ROBATTR_KERNEL(...) static void
#define ROBATTR_DEVICE inline
#define ROBATTR_INLINE static inline

namespace robattr_fast::rt {

using host::Machine;
using host::Site;

constexpr int kWarp = host::kWarp;

inline int thread_index() { return Machine::get().self->thread; }
inline int block_size() { return Machine::get().threads; }
inline int block_index() { return Machine::get().cluster_index * Machine::get().cluster + Machine::get().self->block; }
inline int grid_size() { return Machine::get().clusters * Machine::get().cluster; }
inline int lane() { return thread_index() % kWarp; }
inline int warp() { return thread_index() / kWarp; }
inline int cluster_size() { return Machine::get().cluster; }
inline int cluster_rank() { return Machine::get().self->block; }

inline void sync_threads(Site site = Site::current()) { Machine::get().wait(host::Wait::kThreads, site); }
inline void cluster_sync(Site site = Site::current()) { Machine::get().wait(host::Wait::kCluster, site); }
inline void sync_warp(Site site = Site::current()) { Machine::get().sync_warp(site); }

inline uint32_t ballot(bool predicate, Site site = Site::current()) {
  const uint64_t* values = Machine::get().exchange(predicate, site);
  uint32_t lanes = 0;
  for (int i = 0; i < kWarp; ++i) lanes |= static_cast<uint32_t>(values[i]) << i;
  return lanes;
}

template <class T>
T shuffle(T value, int source_lane, Site site = Site::current()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* values = Machine::get().exchange(bits, site);
  std::memcpy(&value, &values[source_lane & (kWarp - 1)], sizeof value);
  return value;
}

template <class T>
T shuffle_up(T value, int distance, Site site = Site::current()) {
  return rt::shuffle(value, lane() >= distance ? lane() - distance : lane(), site);
}

template <class T>
T shuffle_xor(T value, int mask, Site site = Site::current()) {
  return rt::shuffle(value, lane() ^ mask, site);
}

template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Quad {
  T value[4];
};

template <class T>
class Shared {
  using Kind = Machine::Kind;

 public:
  Shared() = default;
  Shared(int block, int64_t offset, int64_t count) : block_(block), offset_(offset), count_(count) {}

  T load(int i) const { return *at<T>(i, 1, Kind::kRead); }
  void store(int i, T value) const { *at<T>(i, 1, Kind::kWrite) = value; }
  Quad<T> load_quad(int i) const { return *at<Quad<T>>(4 * static_cast<int64_t>(i), 4, Kind::kRead); }
  void store_quad(int i, const Quad<T>& quad) const {
    *at<Quad<T>>(4 * static_cast<int64_t>(i), 4, Kind::kWrite) = quad;
  }
  T atomic_add(int i, T value) const {
    T* place = at<T>(i, 1, Kind::kAtomic);
    const T before = *place;
    *place = static_cast<T>(before + value);
    return before;
  }
  template <class U>
  Shared<U> as() const {
    return Shared<U>(block_, offset_, count_ * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(U)));
  }
  Shared map_shared_rank(int rank) const {
    if (rank < 0 || rank >= cluster_size()) host::report("map_shared_rank", "no such block");
    return Shared(rank, offset_, count_);
  }

 private:
  // The place of `size` elements from the i-th, noted as accessed.
  template <class U>
  U* at(int64_t i, int64_t size, Kind kind) const {
    if (i < 0 || i + size > count_) {
      char detail[128];
      std::snprintf(detail, sizeof detail, "element %lld of an array of %lld at byte %lld", static_cast<long long>(i),
                    static_cast<long long>(count_), static_cast<long long>(offset_));
      host::report("out of bounds", detail);
    }
    Machine& machine = Machine::get();
    const int64_t first = offset_ + i * static_cast<int64_t>(sizeof(T)), bytes = size * static_cast<int64_t>(sizeof(T));
    if (first + bytes > machine.blocks[block_].size)
      host::report("out of bounds", "an array beyond the end of shared memory");
    machine.access(block_, first, bytes, kind);
    return reinterpret_cast<U*>(machine.blocks[block_].memory.get() + first);
  }

  int block_ = 0;
  int64_t offset_ = 0, count_ = 0;
};

template <class T>
Shared<T> dynamic_shared(int offset, int count) {
  if (offset % 16 != 0) host::report("dynamic_shared", "the offset is not a multiple of 16");
  return Shared<T>(cluster_rank(), offset, count);
}

template <class T>
T load_streaming(const T* p) {
  return *p;
}

inline void add_global(int32_t* p, int32_t value) { *p += value; }

}  // namespace robattr_fast::rt
