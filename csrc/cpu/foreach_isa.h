// Compiles the file named by ROBATTR_KERNEL once per instruction set, into namespaces baseline, avx2 and avx512, each
// with cpu/simd.h before it. No include guard. System headers that the kernel needs must be included before.
//
// ROBATTR_DISPATCH(...) is the pointer to the f of the level in use.

#include "cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ROBATTR_INLINE static inline __attribute__((always_inline))

#define ROBATTR_ISA ROBATTR_ISA_BASELINE
namespace robattr_fast::baseline {
#include "cpu/simd.h"
#include ROBATTR_KERNEL
}  // namespace robattr_fast::baseline
#undef ROBATTR_ISA

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,f16c,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c,popcnt")
#endif
#define ROBATTR_ISA ROBATTR_ISA_AVX2
namespace robattr_fast::avx2 {
#include "cpu/simd.h"
#include ROBATTR_KERNEL
}  // namespace robattr_fast::avx2
#undef ROBATTR_ISA
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,f16c,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,f16c,popcnt,prefer-vector-width=512")
#endif
#define ROBATTR_ISA ROBATTR_ISA_AVX512
namespace robattr_fast::avx512 {
#include "cpu/simd.h"
#include ROBATTR_KERNEL
}  // namespace robattr_fast::avx512
#undef ROBATTR_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define ROBATTR_DISPATCH(...)                                                             \
  (::robattr_fast::cpu_isa() == ROBATTR_ISA_AVX512 ? &::robattr_fast::avx512::__VA_ARGS__ \
   : ::robattr_fast::cpu_isa() == ROBATTR_ISA_AVX2 ? &::robattr_fast::avx2::__VA_ARGS__   \
                                                   : &::robattr_fast::baseline::__VA_ARGS__)
#else
#define ROBATTR_DISPATCH(...) (&::robattr_fast::baseline::__VA_ARGS__)
#endif

#undef ROBATTR_KERNEL
