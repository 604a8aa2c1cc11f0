// Philox4x32-10 (Salmon et al., SC 2011) on one 32-bit word, or on anything that holds several.
//
// No include guard: every CPU instruction set and every GPU compilation includes this file once, inside its own
// namespace, after common/philox_keys.h and after defining ROBATTR_INLINE and, for its Word, `^`, `^ uint32_t` and
// `multiply_wide(Word a, uint32_t m, Word& high, Word& low)`.

template <class Word>
struct Words {
  Word word[4];
};

// `block`, `sample`, `image`: the counter. Four words of 32 random bits.
template <class Word>
ROBATTR_INLINE Words<Word> philox4x32(Word block, Word sample, Word image, const PhiloxKeys& keys) {
  Word c0 = block, c1 = sample, c2 = image, c3 = block ^ block;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ keys.round[round][0];
    c1 = low1;
    c2 = high0 ^ c3 ^ keys.round[round][1];
    c3 = low0;
  }
  return {{c0, c1, c2, c3}};
}
