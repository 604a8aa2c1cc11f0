// The key schedule of Philox4x32-10, the same for a whole stream: made once, on the host.
#pragma once

#include <cstdint>

namespace robattr_fast {

struct PhiloxKeys {
  uint32_t round[10][2];

  explicit PhiloxKeys(uint64_t seed) {
    for (uint32_t i = 0; i < 10; ++i) {
      round[i][0] = static_cast<uint32_t>(seed) + i * 0x9E3779B9u;
      round[i][1] = static_cast<uint32_t>(seed >> 32) + i * 0xBB67AE85u;
    }
  }
};

}  // namespace robattr_fast
