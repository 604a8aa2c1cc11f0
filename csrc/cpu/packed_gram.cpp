#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/operators.h"

namespace robattr_fast {
namespace {

// A block of 64 rows by 4 KiB stays in the second-level cache, a tile of 4 + 4 rows in the first.
constexpr int64_t kBlockRows = 64;
constexpr int64_t kChunk = 4096;

}  // namespace
}  // namespace robattr_fast

// A fourth level for this kernel: AVX-512 with VPOPCNTDQ and VNNI (Ice Lake, Zen 4).
#define ROBATTR_ISA_AVX512_COUNT 3
#define ROBATTR_INLINE_MEMBER static inline __attribute__((always_inline))
#define ROBATTR_KERNEL "cpu/packed_gram_kernel.h"
#include "cpu/foreach_isa.h"

#if defined(__x86_64__)
#define ROBATTR_ISA ROBATTR_ISA_AVX512_COUNT
#if defined(__clang__)
#pragma clang attribute push(                                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx512vnni,avx2,bmi,bmi2,popcnt"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx512vnni,avx2,bmi,bmi2,popcnt")
#endif
namespace robattr_fast::avx512_count {
#include "cpu/packed_gram_kernel.h"
}  // namespace robattr_fast::avx512_count
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef ROBATTR_ISA
#endif

namespace robattr_fast {
namespace {

using Kernel = decltype(&baseline::gram_bits);

Kernel choose_kernel(bool bits) {
#if defined(__x86_64__)
  if (cpu_isa() == ROBATTR_ISA_AVX512 && __builtin_cpu_supports("avx512vpopcntdq") &&
      __builtin_cpu_supports("avx512vnni")) {
    return bits ? &avx512_count::gram_bits : &avx512_count::gram_nibbles;
  }
#endif
  return bits ? ROBATTR_DISPATCH(gram_bits) : ROBATTR_DISPATCH(gram_nibbles);
}

}  // namespace

void packed_gram(Tensor out, Tensor rows, Tensor other, std::optional<Tensor> mask, int64_t num_levels,
                 bool symmetric) {
  const int64_t bytes = rows.size(1), rows_a = rows.size(0), rows_b = other.size(0);
  const auto* a = static_cast<const uint8_t*>(rows.const_data_ptr());
  const auto* b = static_cast<const uint8_t*>(other.const_data_ptr());
  const uint8_t* weights = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  auto* gram = static_cast<int64_t*>(out.mutable_data_ptr());
  const Kernel kernel = choose_kernel(num_levels == 1);
  const int64_t blocks_a = (rows_a + kBlockRows - 1) / kBlockRows, blocks_b = (rows_b + kBlockRows - 1) / kBlockRows;

  parallel_for(0, blocks_a * blocks_b, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> masked(weights ? kBlockRows * kChunk : 0);
    for (int64_t task = begin; task < end; ++task) {
      // Neighbouring tasks lie on one diagonal, so that each thread has its share of the half that is computed.
      const int64_t block_a = symmetric ? task % blocks_a : task / blocks_b;
      const int64_t block_b = symmetric ? (task / blocks_a + block_a) : task % blocks_b;
      if (block_b >= blocks_b) continue;
      const int64_t i = block_a * kBlockRows, j = block_b * kBlockRows;
      const int64_t count_a = std::min(kBlockRows, rows_a - i), count_b = std::min(kBlockRows, rows_b - j);
      int64_t* tile = gram + i * rows_b + j;
      for (int64_t r = 0; r < count_a; ++r) std::fill_n(tile + r * rows_b, count_b, 0);
      for (int64_t k = 0; k < bytes; k += kChunk) {
        const int64_t length = std::min(kChunk, bytes - k);
        const uint8_t* left = a + i * bytes + k;
        int64_t stride = bytes;
        if (weights != nullptr) {
          for (int64_t r = 0; r < count_a; ++r) {
            for (int64_t e = 0; e < length; ++e) masked[r * kChunk + e] = left[r * bytes + e] & weights[k + e];
          }
          left = masked.data();
          stride = kChunk;
        }
        kernel(left, stride, count_a, b + j * bytes + k, bytes, count_b, length, tile, rows_b);
      }
      if (symmetric && block_a != block_b) {
        for (int64_t r = 0; r < count_a; ++r) {
          for (int64_t c = 0; c < count_b; ++c) gram[(j + c) * rows_b + i + r] = tile[r * rows_b + c];
        }
      }
    }
  });
}

}  // namespace robattr_fast
