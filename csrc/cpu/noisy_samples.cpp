#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/operators.h"

namespace robattr_fast {
namespace {

// What the noise of one sample depends on, besides the element.
struct Stream {
  uint64_t seed;
  uint32_t sample, image;
};

// Elements of one sample; elements of one channel; distance of neighbouring pixels in the output.
struct Row {
  int64_t n, plane, pixel_stride;
};

constexpr int64_t kTilesPerTask = 128;

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
         int64_t num_samples, const Row& row) {
  std::vector<Compute> converted;
  const Compute* input = static_cast<const Compute*>(x.const_data_ptr());
  if (x.scalar_type() != scalar_type_of<Compute>) {
    converted = to_vector<Compute>(x);
    input = converted.data();
  }
  const auto kernel = ROBATTR_DISPATCH(noisy_tiles<Compute, Out>);
  const int64_t tiles = (row.n + 63) / 64;
  const int64_t tasks = (tiles + kTilesPerTask - 1) / kTilesPerTask;
  parallel_for(0, x.size(0) * num_samples * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = i % tasks, draw = i / tasks;
      const int64_t image = draw / num_samples, sample = draw % num_samples;
      const Stream stream{seed, static_cast<uint32_t>(first_sample + sample), static_cast<uint32_t>(image_ids[image])};
      const int64_t first = task * kTilesPerTask;
      kernel(input + image * row.n, out + draw * row.n, static_cast<Compute>(sigma), stream, row, first,
             std::min(first + kTilesPerTask, tiles));
    }
  });
}

}  // namespace

void noisy_samples(Tensor out, Tensor x, double sigma, int64_t seed, int64_t first_sample, Tensor image_ids) {
  const int64_t num_samples = out.size(1);
  const int64_t n = x.numel() / x.size(0);
  Row row{n, n, 1};
  if (!out.is_contiguous()) {
    // Each sample channels-last: [C, H, W] with channel stride 1.
    STD_TORCH_CHECK(out.dim() == 5 && out.stride(2) == 1 && out.stride(4) == out.size(2) && out.stride(1) == n,
                    "noisy_samples: out must be contiguous, or channels-last contiguous per sample");
    row = Row{n, n / out.size(2), out.size(2)};
  }
  const auto* ids = static_cast<const int64_t*>(image_ids.const_data_ptr());
  dispatch_float(out.scalar_type(), [&](auto tag) {
    using Out = decltype(tag);
    using Compute = std::conditional_t<std::is_same_v<Out, double>, double, float>;
    run<Compute>(static_cast<Out*>(out.mutable_data_ptr()), x, sigma, static_cast<uint64_t>(seed), first_sample, ids,
                 num_samples, row);
  });
}

}  // namespace robattr_fast
