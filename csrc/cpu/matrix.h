// Matrices that lie in the cache, and the memory of one thread that they are taken from.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace robattr_fast {

// Row-major.
template <class F>
struct Matrix {
  F* data = nullptr;
  int64_t rows = 0, columns = 0;  // columns: also the pitch

  F* row(int64_t r) const { return data + r * columns; }
};

// Handed out from the start anew at each `of_thread`; grows to the largest request.
class Arena {
 public:
  static Arena& of_thread(int64_t bytes) {
    static thread_local Arena arena;
    if (arena.bytes_ < bytes) {
      arena.memory_.reset(new std::byte[bytes + kAlignment]);
      arena.bytes_ = bytes;
    }
    arena.used_ = -reinterpret_cast<uintptr_t>(arena.memory_.get()) % kAlignment;
    arena.end_ = arena.used_ + bytes;
    return arena;
  }

  // What `take` of so many elements of F uses.
  template <class F>
  static constexpr int64_t bytes_of(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(F)) + kAlignment - 1) / kAlignment * kAlignment;
  }

  template <class F>
  F* take(int64_t count) {
    STD_TORCH_CHECK(used_ + bytes_of<F>(count) <= end_, "scratch memory of ", end_, " bytes is too small");
    F* const p = reinterpret_cast<F*>(memory_.get() + used_);
    used_ += bytes_of<F>(count);
    return p;
  }

  template <class F>
  Matrix<F> matrix(int64_t rows, int64_t columns) {
    return {take<F>(rows * columns), rows, columns};
  }

 private:
  static constexpr int64_t kAlignment = 64;
  std::unique_ptr<std::byte[]> memory_;
  int64_t bytes_ = 0, used_ = 0, end_ = 0;
};

}  // namespace robattr_fast
