// Philox4x32-10 (Salmon et al., SC 2011) on whatever `u32` the including scope defines: one word, or a vector of them.
//
// No include guard: every CPU instruction set and every GPU compilation includes this file once, inside its own
// namespace, after defining `u32`, `multiply_wide(u32 a, uint32_t m, u32& high, u32& low)` and ROBATTR_INLINE.

struct Words {
  u32 word[4];
};

// `block`, `sample`, `image`: the counter; `key`: the 64-bit seed. Four words of 32 random bits.
ROBATTR_INLINE Words philox4x32(u32 block, u32 sample, u32 image, uint64_t key) {
  u32 c0 = block, c1 = sample, c2 = image, c3 = block ^ block;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    u32 high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}
