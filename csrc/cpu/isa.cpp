#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

namespace robattr_fast {
namespace {

int detect() {
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

int choose() {
  const int detected = detect();
  const char* wanted = std::getenv("ROBATTR_FAST_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return detected;
  for (int isa = ROBATTR_ISA_BASELINE; isa <= ROBATTR_ISA_AVX512; ++isa) {
    if (std::strcmp(wanted, cpu_isa_name(isa)) == 0) {
      STD_TORCH_CHECK(isa <= detected, "ROBATTR_FAST_CPU_ISA: got ", wanted, ", this CPU has ", cpu_isa_name(detected));
      return isa;
    }
  }
  STD_TORCH_CHECK(false, "ROBATTR_FAST_CPU_ISA: got ", wanted, ", takes baseline, avx2 or avx512");
  return detected;
}

}  // namespace

int cpu_isa() {
  static const int isa = choose();
  return isa;
}

const char* cpu_isa_name(int isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[isa];
}

}  // namespace robattr_fast
