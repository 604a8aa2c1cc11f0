#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/philox_keys.h"
#include "cpu/operators.h"

namespace robattr_fast {
namespace {

// What the noise of one sample depends on, besides the element.
struct Stream {
  const PhiloxKeys& keys;
  uint32_t sample, image;
};

constexpr int64_t kTile = 64;
// Of one task: its strip of all channels, before they are interleaved, stays in the first-level cache.
constexpr int64_t kTaskElements = 4096;
constexpr int64_t kMostPlanes = kTaskElements / kTile;

// `channels` planes of `plane` elements each, of which one pixel has one element; in the output the channels of a pixel
// are neighbours. Contiguous output is one channel.
struct Layout {
  int64_t channels, plane;

  // Pixels of one task, in whole tiles.
  int64_t strip() const { return kTaskElements / std::min(channels, kMostPlanes) / kTile * kTile; }
};

}  // namespace
}  // namespace robattr_fast

#define ROBATTR_KERNEL "cpu/noisy_samples_kernel.h"
#include "cpu/foreach_isa.h"

namespace robattr_fast {
namespace {

template <class T>
std::vector<T> to_vector(const Tensor& x) {
  std::vector<T> values(x.numel());
  dispatch_float(x.scalar_type(), [&](auto tag) {
    const auto* p = static_cast<const decltype(tag)*>(x.const_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(p[i]);
  });
  return values;
}

template <class Compute, class Out>
void run(Out* out, const Tensor& x, double sigma, uint64_t seed, int64_t first_sample, const int64_t* image_ids,
         int64_t num_samples, const Layout& layout) {
  std::vector<Compute> converted;
  const Compute* input = static_cast<const Compute*>(x.const_data_ptr());
  if (x.scalar_type() != scalar_type_of<Compute>) {
    converted = to_vector<Compute>(x);
    input = converted.data();
  }
  const auto kernel = ROBATTR_DISPATCH(noisy_pixels<Compute, Out>);
  const PhiloxKeys keys(seed);
  const int64_t n = layout.channels * layout.plane;
  const int64_t strip = layout.strip(), strips = (layout.plane + strip - 1) / strip;
  parallel_for(0, x.size(0) * num_samples * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / strips, b = row / num_samples, sample = row % num_samples;
      const Stream stream{keys, static_cast<uint32_t>(first_sample + sample), static_cast<uint32_t>(image_ids[b])};
      const int64_t first = task % strips * strip;
      kernel(input + b * n, out + row * n, static_cast<Compute>(sigma), stream, layout, first,
             std::min(first + strip, layout.plane));
    }
  });
}

}  // namespace

void noisy_samples(Tensor out, Tensor x, double sigma, int64_t seed, int64_t first_sample, Tensor image_ids) {
  const int64_t num_samples = out.size(1);
  const int64_t n = x.numel() / x.size(0);
  Layout layout{1, n};
  if (!out.is_contiguous()) {
    // Each sample channels-last: [C, H, W] with channel stride 1.
    STD_TORCH_CHECK(out.dim() == 5 && out.stride(2) == 1 && out.stride(4) == out.size(2) && out.stride(1) == n,
                    "noisy_samples: out must be contiguous, or channels-last contiguous per sample");
    layout = Layout{out.size(2), n / out.size(2)};
  }
  const auto* ids = static_cast<const int64_t*>(image_ids.const_data_ptr());
  dispatch_float(out.scalar_type(), [&](auto tag) {
    using Out = decltype(tag);
    using Compute = std::conditional_t<std::is_same_v<Out, double>, double, float>;
    run<Compute>(static_cast<Out*>(out.mutable_data_ptr()), x, sigma, static_cast<uint64_t>(seed), first_sample, ids,
                 num_samples, layout);
  });
}

}  // namespace robattr_fast
