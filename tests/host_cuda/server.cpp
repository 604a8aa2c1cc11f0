// Runs the kernels of csrc/cuda on a simulated device, one request after another from stdin (host_cuda/__init__.py).
// Each request is executed under every schedule, and all must give the same bytes.
#include <cstdio>
#include <string>

#include "cuda/count_sparsified.cuh"
#include "cuda/topk_threshold.cuh"

using namespace robattr_fast;

namespace {

struct Request {
  int64_t operation, type;  // 0: topk_threshold, 1: count_sparsified; 0..3: float32, float64, bfloat16, float16
  int64_t images, samples, n, image_stride, sample_stride, stride;
  int64_t offset, bytes;  // of the first score, and of all that follow the request
  int64_t k, k_gamma, levels, packed, row_bytes;
  int64_t shared_per_block, shared_for_two, has_clusters, clusters;
};

constexpr host::Schedule kSchedules[] = {
    {host::Order::kForward, 0}, {host::Order::kReverse, 0}, {host::Order::kRandom, 1}, {host::Order::kRandom, 2}};

void receive(void* data, size_t bytes) {
  if (std::fread(data, 1, bytes, stdin) != bytes) std::exit(0);
}

template <class T>
struct Buffer {  // of exactly `count` elements, so that the sanitizer guards its ends
  explicit Buffer(size_t count, int fill) : count(count), data(new T[count]) { std::memset(data.get(), fill, bytes()); }
  size_t bytes() const { return count * sizeof(T); }
  std::string text() const { return {reinterpret_cast<const char*>(data.get()), bytes()}; }
  size_t count;
  std::unique_ptr<T[]> data;
};

template <class Element, bool kResident>
std::string run(const Request& q, const Plan& plan, const char* scores, host::Schedule schedule) {
  using Key = typename Element::Key;
  const int64_t count = q.images * q.samples;
  const Rows rows{scores + q.offset, count, q.samples, q.image_stride, q.sample_stride, q.stride};
  const int clusters = static_cast<int>(std::min(q.clusters, count));
  host::Machine& machine = host::Machine::get();
  if (q.operation == 0) {
    Buffer<Key> out(count, 0xFF);
    const ThresholdArguments<Key> a{rows, plan, static_cast<int>(q.k), sample_ranks(q.k, q.n), out.data.get()};
    machine.launch(clusters, plan.cluster, plan.threads, plan.shared_bytes, schedule,
                   [&] { topk_threshold_kernel<Element, kResident>(a); });
    return out.text();
  }
  Buffer<int32_t> counts(q.images * q.n * q.levels, 0), invalid(q.images, 0);
  Buffer<uint8_t> packed(q.packed ? count * q.row_bytes : 0, 0xFF);
  const CountArguments a{rows,
                         plan,
                         static_cast<int>(q.k),
                         static_cast<int>(q.k_gamma),
                         sample_ranks(q.k, q.n),
                         sample_ranks(q.k_gamma, q.n),
                         static_cast<int>(q.levels),
                         counts.data.get(),
                         invalid.data.get(),
                         q.packed ? packed.data.get() : nullptr,
                         q.row_bytes};
  machine.launch(clusters, plan.cluster, plan.threads, plan.shared_bytes, schedule,
                 [&] { count_sparsified_kernel<Element, kResident>(a); });
  return counts.text() + invalid.text() + packed.text();
}

template <class Element>
std::string run_all(const Request& q, const char* scores) {
  const Device device{static_cast<int>(q.shared_per_block), static_cast<int>(q.shared_for_two), q.has_clusters != 0};
  const Plan plan =
      make_plan(q.n, sizeof(typename Element::Key), static_cast<int>(q.operation == 0 ? 0 : q.levels), device);
  std::string first;
  for (const host::Schedule& schedule : kSchedules) {
    const std::string result =
        plan.resident ? run<Element, true>(q, plan, scores, schedule) : run<Element, false>(q, plan, scores, schedule);
    if (&schedule == kSchedules) first = result;
    if (result != first) host::report("schedules disagree", "a result depends on the order of threads");
  }
  const int64_t about[] = {plan.cluster, plan.resident, plan.staged >= 0, plan.sampled};
  return std::string(reinterpret_cast<const char*>(about), sizeof about) + first;
}

}  // namespace

int main() {
  for (;;) {
    Request q;
    receive(&q, sizeof q);
    Buffer<char> scores(q.bytes, 0);
    receive(scores.data.get(), q.bytes);
    const std::string reply = q.type == 0   ? run_all<Float32>(q, scores.data.get())
                              : q.type == 1 ? run_all<Float64>(q, scores.data.get())
                              : q.type == 2 ? run_all<BFloat16>(q, scores.data.get())
                                            : run_all<Float16>(q, scores.data.get());
    const int64_t size = static_cast<int64_t>(reply.size());
    std::fwrite(&size, sizeof size, 1, stdout);
    std::fwrite(reply.data(), 1, reply.size(), stdout);
    std::fflush(stdout);
  }
}
