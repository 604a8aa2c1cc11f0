// One tile (64 normals) per step: 16 blocks of Philox side by side. Compiled once per instruction set (foreach_isa.h).

#include "common/normal.h"
#include "common/philox.h"

constexpr int kTile = 64;

// z[word * 16 + lane] of one tile
ROBATTR_INLINE void tile_normals(uint32_t tile, uint32_t sample, uint32_t image, uint64_t seed, float* z) {
  const u32 zero = {};
  const Words w = philox4x32(iota(tile * 16u), zero + sample, zero + image, seed);
  f32 n[4];
  box_muller(w.word[0], w.word[1], n[0], n[1]);
  box_muller(w.word[2], w.word[3], n[2], n[3]);
  for (int i = 0; i < 4; ++i) store(z + i * kLanes, n[i]);
}

ROBATTR_INLINE float noisy(float x, float sigma, float z) { return x + sigma * z; }
ROBATTR_INLINE double noisy(double x, double sigma, float z) { return x + sigma * static_cast<double>(z); }

// Tiles [first_tile, last_tile) of one sample. x [n] has the type of the arithmetic; element e goes to out[e], or,
// where pixel_stride (the number of channels) is above 1, to out[(e % plane) * pixel_stride + e / plane].
template <class Compute, class Out>
static void noisy_tiles(const Compute* x, Out* out, Compute sigma, const Stream& stream, const Row& row,
                        int64_t first_tile, int64_t last_tile) {
  const auto [n, plane, pixel_stride] = row;
  alignas(64) float z[kTile];
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    tile_normals(static_cast<uint32_t>(tile), stream.sample, stream.image, stream.seed, z);
    const int64_t e = tile * kTile;
    const int count = static_cast<int>(n - e < kTile ? n - e : kTile);
    if (pixel_stride == 1) {
      if (count == kTile) {
        for (int i = 0; i < kTile; ++i) out[e + i] = static_cast<Out>(noisy(x[e + i], sigma, z[i]));
      } else {
        for (int i = 0; i < count; ++i) out[e + i] = static_cast<Out>(noisy(x[e + i], sigma, z[i]));
      }
    } else {
      int64_t channel = e / plane, pixel = e % plane;
      for (int i = 0; i < count; ++i) {
        out[pixel * pixel_stride + channel] = static_cast<Out>(noisy(x[e + i], sigma, z[i]));
        if (++pixel == plane) pixel = 0, ++channel;
      }
    }
  }
}
