// One tile (64 elements) is 16 blocks of Philox, as many side by side as a register has lanes. Compiled once per
// instruction set (foreach_isa.h).

// Counter words in the low halves of 64-bit lanes, those of even blocks and of odd ones: the products of 32-bit words
// are formed there, and need not be moved between the rounds. The high halves hold anything.
struct SplitWords {
  u32 even, odd;
};

ROBATTR_INLINE SplitWords operator^(SplitWords a, SplitWords b) { return {a.even ^ b.even, a.odd ^ b.odd}; }
ROBATTR_INLINE SplitWords operator^(SplitWords a, uint32_t b) { return {a.even ^ b, a.odd ^ b}; }
ROBATTR_INLINE SplitWords splat(uint32_t word) { return {u32{} + word, u32{} + word}; }

ROBATTR_INLINE void multiply_wide(SplitWords a, uint32_t m, SplitWords& high, SplitWords& low) {
  const u64 even = multiply_low_halves((u64)a.even, (u64)(u32{} + m));
  const u64 odd = multiply_low_halves((u64)a.odd, (u64)(u32{} + m));
  low = {(u32)even, (u32)odd};
  high = {(u32)(even >> 32), (u32)(odd >> 32)};
}

#include "common/normal.h"
#include "common/philox.h"

// first, first + 1, ...
ROBATTR_INLINE SplitWords consecutive(uint32_t first) {
  constexpr uint32_t kEven[16] = {0, 0, 2, 0, 4, 0, 6, 0, 8, 0, 10, 0, 12, 0, 14, 0};
  u32 even;
  std::memcpy(&even, kEven, sizeof even);
  return {even + first, even + (first + 1)};
}

// kLanes elements at out: x + sigma z, rounded to the type of out.
ROBATTR_INLINE void emit(const float* x, float sigma, f32 z, float* out) { store(out, load(x) + sigma * z); }

typedef uint16_t u16 __attribute__((vector_size(kRegister / 2)));

ROBATTR_INLINE void emit(const float* x, float sigma, f32 z, c10::BFloat16* out) {
  const f32 noisy = load(x) + sigma * z;
  const u32 bits = (u32)noisy;
  const u32 rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16;
  const u16 result = __builtin_convertvector(noisy == noisy ? rounded : u32{} + 0x7FC0, u16);
  std::memcpy(out, &result, sizeof result);
}

ROBATTR_INLINE void emit(const float* x, float sigma, f32 z, c10::Half* out) {
  const f32 noisy = load(x) + sigma * z;
#if ROBATTR_ISA == ROBATTR_ISA_AVX512
  const __m256i result = _mm512_cvtps_ph((__m512)noisy, _MM_FROUND_TO_NEAREST_INT);
#elif ROBATTR_ISA == ROBATTR_ISA_AVX2
  const __m128i result = _mm256_cvtps_ph((__m256)noisy, _MM_FROUND_TO_NEAREST_INT);
#else
  const i32 size = bits_of(noisy) & 0x7FFFFFFF;
  const i32 normal = (size - (112 << 23) + (((size >> 13) & 1) + 0xFFF)) >> 13;
  // Half's denormals are multiples of 2^-24, as are the floats in [1/2, 1).
  const i32 denormal = bits_of(float_from_bits(size) + 0.5f) - bits_of(f32{} + 0.5f);
  const i32 finite = size < 113 << 23 ? denormal : normal;
  const i32 special = size > 255 << 23 ? i32{} + 0x7E00 : i32{} + 0x7C00;
  const i32 sign = (i32)((u32)bits_of(noisy) >> 16) & 0x8000;
  const u16 result = __builtin_convertvector(sign | (size < 143 << 23 ? finite : special), u16);
#endif
  std::memcpy(out, &result, sizeof result);
}

ROBATTR_INLINE void emit(const double* x, double sigma, f32 z, double* out) {
  typedef float Half __attribute__((vector_size(kRegister / 2)));
  Half half[2];
  std::memcpy(half, &z, sizeof z);
  for (int i = 0; i < 2; ++i) {
    f64 noisy;
    std::memcpy(&noisy, x + i * kLanes / 2, sizeof noisy);
    noisy += sigma * __builtin_convertvector(half[i], f64);
    std::memcpy(out + i * kLanes / 2, &noisy, sizeof noisy);
  }
}

// All 64 elements of a tile; x and out point at the first.
template <class Compute, class Out>
ROBATTR_INLINE void noisy_tile(const Compute* x, Out* out, Compute sigma, const Stream& stream, uint32_t tile) {
  const SplitWords sample = splat(stream.sample), image = splat(stream.image);
  for (int lane = 0; lane < 16; lane += kLanes) {
    const auto words = philox4x32(consecutive(tile * 16 + lane), sample, image, stream.keys);
    u32 w[4];
    for (int i = 0; i < 4; ++i) w[i] = zip_low_halves((u64)words.word[i].even, (u64)words.word[i].odd);
    for (int i = 0; i < 4; i += 2) {
      f32 z0, z1;
      box_muller(w[i], w[i + 1], z0, z1);
      emit(x + i * 16 + lane, sigma, z0, out + i * 16 + lane);
      emit(x + (i + 1) * 16 + lane, sigma, z1, out + (i + 1) * 16 + lane);
    }
  }
}

// Elements [first, last) of one sample; x points at element 0, out at where element `first` goes. As much memory from
// `later` on, which will be written soon, is fetched meanwhile.
template <class Compute, class Out>
static void noisy_range(const Compute* x, Out* out, Compute sigma, const Stream& stream, int64_t first, int64_t last,
                        const Out* later) {
  constexpr int kPerLine = 64 / sizeof(Out);
  for (int64_t e = first; e < last;) {
    const int64_t tile = e / kTile, begin = tile * kTile, end = std::min(begin + kTile, last);
    if (end - e == kTile) {
      for (int i = 0; i < kTile; i += kPerLine) __builtin_prefetch(later + (e - first) + i, 1);
      noisy_tile(x + e, out + (e - first), sigma, stream, static_cast<uint32_t>(tile));
    } else {
      Compute some_x[kTile] = {};
      Out some_out[kTile];
      std::copy(x + e, x + end, some_x + (e - begin));
      noisy_tile(some_x, some_out, sigma, stream, static_cast<uint32_t>(tile));
      std::copy(some_out + (e - begin), some_out + (end - begin), out + (e - first));
    }
    e = end;
  }
}

// out[pixel * pitch + channel] = planes[channel * strip + pixel]
template <class T>
static void interleave(const T* __restrict planes, int64_t strip, int64_t pixels, int channels, T* __restrict out,
                       int64_t pitch) {
  if (channels == 3 && pitch == 3) {
    const T* __restrict red = planes, * __restrict green = planes + strip, * __restrict blue = planes + 2 * strip;
    for (int64_t i = 0; i < pixels; ++i) {
      out[3 * i] = red[i];
      out[3 * i + 1] = green[i];
      out[3 * i + 2] = blue[i];
    }
  } else {
    for (int64_t i = 0; i < pixels; ++i) {
      for (int c = 0; c < channels; ++c) out[i * pitch + c] = planes[c * strip + i];
    }
  }
}

// Pixels [first, last), at most layout.strip(), of one sample; x and out point at its first element.
template <class Compute, class Out>
static void noisy_pixels(const Compute* x, Out* out, Compute sigma, const Stream& stream, const Layout& layout,
                         int64_t first, int64_t last) {
  constexpr int64_t kAhead = 2048 / sizeof(Out);
  out += first * layout.channels;
  if (layout.channels == 1) return noisy_range(x, out, sigma, stream, first, last, out + kAhead);
  alignas(64) Out planes[kTaskElements];
  const int64_t strip = layout.strip(), pixels = last - first;
  for (int64_t channel = 0; channel < layout.channels; channel += kMostPlanes) {
    const int count = static_cast<int>(std::min<int64_t>(layout.channels - channel, kMostPlanes));
    for (int c = 0; c < count; ++c) {
      const int64_t plane = (channel + c) * layout.plane;
      noisy_range(x, planes + c * strip, sigma, stream, plane + first, plane + last, out + (channel + c) * pixels);
    }
    interleave(planes, strip, pixels, count, out + channel, layout.channels);
  }
}
