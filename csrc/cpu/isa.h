// Instruction sets the CPU kernels are compiled for, and the choice among them at run time.
#pragma once

#define ROBATTR_ISA_BASELINE 0
#define ROBATTR_ISA_AVX2 1
#define ROBATTR_ISA_AVX512 2

namespace robattr_fast {

// The level in use: what this CPU has, or less where ROBATTR_FAST_CPU_ISA (baseline | avx2 | avx512) asks for less.
// Read once per process.
int cpu_isa();

// The name of a level.
const char* cpu_isa_name(int isa);

}  // namespace robattr_fast
