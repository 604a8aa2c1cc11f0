// All that kernels in csrc/cuda may use of CUDA, so that they also run on a host: tests/host_cuda/cuda/rt.cuh is a
// second implementation of this header that executes threads as fibers and watches shared memory.
//
// Every function is called by all threads of its scope: those named sync_*, shuffle_*, ballot and cluster_sync by whole
// warps, blocks or clusters.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// Takes the threads of a block at most, and the blocks that shall fit on a multiprocessor at least.
#define ROBATTR_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define ROBATTR_DEVICE __device__ __forceinline__
#define ROBATTR_INLINE static __device__ __forceinline__

namespace robattr_fast::rt {

constexpr int kWarp = 32;

ROBATTR_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
ROBATTR_DEVICE int block_size() { return static_cast<int>(blockDim.x); }
ROBATTR_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
ROBATTR_DEVICE int grid_size() { return static_cast<int>(gridDim.x); }
ROBATTR_DEVICE int lane() { return thread_index() % kWarp; }
ROBATTR_DEVICE int warp() { return thread_index() / kWarp; }

ROBATTR_DEVICE void sync_threads() { __syncthreads(); }
ROBATTR_DEVICE void sync_warp() { __syncwarp(); }
ROBATTR_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(~0u, predicate); }

template <class T>
ROBATTR_DEVICE T shuffle(T value, int source_lane) {
  return __shfl_sync(~0u, value, source_lane);
}
template <class T>
ROBATTR_DEVICE T shuffle_up(T value, int distance) {
  return __shfl_up_sync(~0u, value, distance);
}
template <class T>
ROBATTR_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}

// Before sm_90 every block is a cluster of its own.
ROBATTR_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterSizeInBlocks());
#else
  return 1;
#endif
}

ROBATTR_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}

// Orders shared memory of the whole cluster.
ROBATTR_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  if (__clusterSizeInBlocks() > 1) {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
    return;
  }
#endif
  __syncthreads();
}

// Four neighbours, moved by accesses of 16 bytes where T allows.
template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Quad {
  T value[4];
};

// An array in shared memory, of this block or (map_shared_rank) of another one in the cluster.
template <class T>
class Shared {
 public:
  Shared() = default;
  ROBATTR_DEVICE explicit Shared(T* data) : data_(data) {}
  ROBATTR_DEVICE T load(int i) const { return data_[i]; }
  ROBATTR_DEVICE void store(int i, T value) const { data_[i] = value; }
  // Elements 4 i to 4 i + 3.
  ROBATTR_DEVICE Quad<T> load_quad(int i) const { return reinterpret_cast<const Quad<T>*>(data_)[i]; }
  ROBATTR_DEVICE void store_quad(int i, const Quad<T>& quad) const { reinterpret_cast<Quad<T>*>(data_)[i] = quad; }
  // Returns what was there before.
  ROBATTR_DEVICE T atomic_add(int i, T value) const { return atomicAdd(data_ + i, value); }
  template <class U>
  ROBATTR_DEVICE Shared<U> as() const {
    return Shared<U>(reinterpret_cast<U*>(data_));
  }
  ROBATTR_DEVICE Shared map_shared_rank(int rank) const {
#if __CUDA_ARCH__ >= 900
    return Shared(static_cast<T*>(__cluster_map_shared_rank(data_, static_cast<unsigned>(rank))));
#else
    return *this;
#endif
  }

 private:
  T* data_ = nullptr;
};

// The array of `count` elements that starts `offset` bytes, a multiple of 16, into the dynamic shared memory.
template <class T>
ROBATTR_DEVICE Shared<T> dynamic_shared(int offset, [[maybe_unused]] int count) {
  extern __shared__ __align__(16) char memory[];
  return Shared<T>(reinterpret_cast<T*>(memory + offset));
}

// Global memory that is read once should not push out what is read again.
template <class T>
ROBATTR_DEVICE T load_streaming(const T* p) {
  if constexpr (sizeof(T) == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
    return reinterpret_cast<const T&>(bits);
  } else if constexpr (sizeof(T) == 8) {
    const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(p));
    return reinterpret_cast<const T&>(bits);
  } else {
    return __ldcs(p);
  }
}

// Relaxed, in global memory.
ROBATTR_DEVICE void add_global(int32_t* p, int32_t value) { atomicAdd(p, value); }

}  // namespace robattr_fast::rt
