// Instruction sets the CPU kernels are compiled for, and the level in use.
#pragma once

#define ROBATTR_ISA_BASELINE 0
#define ROBATTR_ISA_AVX2 1
#define ROBATTR_ISA_AVX512 2

namespace robattr_fast {

// The level in use: the widest of this CPU, or what robattr_fast_cpu_isa_use was told.
int cpu_isa();

}  // namespace robattr_fast

// Called by robattr_fast/_extension.py when it loads the extension, before any kernel runs; it knows the levels' names
// and what ROBATTR_FAST_CPU_ISA asks for.
extern "C" {

// The widest level that this CPU has.
int robattr_fast_cpu_isa_widest();

// The level in use, and what sets it; this CPU must have it.
int robattr_fast_cpu_isa();
void robattr_fast_cpu_isa_use(int isa);
}
