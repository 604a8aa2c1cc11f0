// Rows of scores, and the memory that one thread needs to select among the elements of a row.
#pragma once

// What cpu/select.h uses.
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>

#include "cpu/operators.h"

namespace robattr_fast {

// int32_t for float, bfloat16 and half; int64_t for double: see common/float_key.h.
template <class F>
void dispatch_key(ScalarType type, const F& f) {
  return type == ScalarType::Double ? f(int64_t{}) : f(int32_t{});
}

// Row r of a tensor [rows, n] or [images, samples, n] of any strides.
struct Rows {
  const char* data;
  ScalarType type;
  int64_t count, n, samples;
  int64_t image_stride, sample_stride, stride;  // in elements

  explicit Rows(const Tensor& scores)
      : data(static_cast<const char*>(scores.const_data_ptr())),
        type(scores.scalar_type()),
        n(scores.size(scores.dim() - 1)),
        samples(scores.size(scores.dim() - 2)),
        image_stride(scores.dim() == 3 ? scores.stride(0) : 0),
        sample_stride(scores.stride(scores.dim() - 2)),
        stride(scores.stride(scores.dim() - 1)) {
    count = scores.numel() / n;
    STD_TORCH_CHECK(n <= INT32_MAX, "scores: got rows of ", n, " elements, takes at most 2^31 - 1");
  }

  template <class T>
  const T* row(int64_t r) const {
    return reinterpret_cast<const T*>(data) + r / samples * image_stride + r % samples * sample_stride;
  }
};

// Tasks of at least some ten microseconds: waking a thread costs about as much.
inline int64_t rows_per_task(int64_t n) { return std::max<int64_t>(1, 32768 / n); }

constexpr int kMaxLevels = 15;
constexpr int kSamples = 1024;
constexpr int kMaxBinBits = 11;
constexpr int kPadding = 16;  // whole vectors are stored at the end of a list

// Lives as long as its thread and grows to the longest row seen.
template <class Key>
struct Scratch {
  std::unique_ptr<Key[]> converted, keys, work;
  std::unique_ptr<uint32_t[]> index, level;
  int64_t capacity = 0;
  Key sample[kSamples + kPadding];
  uint32_t histogram[2][1 << kMaxBinBits];

  void reserve(int64_t n) {
    if (n <= capacity) return;
    for (auto* p : {&converted, &keys, &work}) p->reset(new Key[n + kPadding]);
    for (auto* p : {&index, &level}) p->reset(new uint32_t[n + kPadding]);
    capacity = n;
  }

  static Scratch& of_thread(int64_t n) {
    static thread_local Scratch scratch;
    scratch.reserve(n);
    return scratch;
  }
};

}  // namespace robattr_fast
