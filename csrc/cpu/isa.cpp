#include "cpu/isa.h"

#define ROBATTR_EXPORT __attribute__((visibility("default")))

namespace robattr_fast {
namespace {

int widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // All that foreach_isa.h lets the compiler use.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("popcnt");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return ROBATTR_ISA_AVX512;
  }
  if (avx2) return ROBATTR_ISA_AVX2;
#endif
  return ROBATTR_ISA_BASELINE;
}

int in_use = widest();

}  // namespace

int cpu_isa() { return in_use; }

}  // namespace robattr_fast

extern "C" {

ROBATTR_EXPORT int robattr_fast_cpu_isa_widest() { return robattr_fast::widest(); }

ROBATTR_EXPORT int robattr_fast_cpu_isa() { return robattr_fast::in_use; }

ROBATTR_EXPORT void robattr_fast_cpu_isa_use(int isa) { robattr_fast::in_use = isa; }
}
