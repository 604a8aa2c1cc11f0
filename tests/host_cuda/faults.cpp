// Small kernels with one deliberate fault each, and their correct forms: argv[1] names one. Prints a checksum.
#include <cstdio>
#include <map>
#include <string>

#include "cuda/rt.cuh"

using namespace robattr_fast;

namespace {

constexpr int kThreads = 64;
int32_t* out;  // [kThreads] per block, in global memory

rt::Shared<int32_t> values() { return rt::dynamic_shared<int32_t>(0, kThreads); }

// Each thread takes over what its neighbour has written.
void rotate(bool barrier) {
  const int t = rt::thread_index();
  values().store(t, t);
  if (barrier) rt::sync_threads();
  out[t] = values().load((t + 1) % kThreads);
}

// Written again without waiting for those who read.
void overwrite(bool barrier) {
  const int t = rt::thread_index();
  values().store(t, t);
  rt::sync_threads();
  const int neighbour = values().load((t + 1) % kThreads);
  if (barrier) rt::sync_threads();
  values().store(t, neighbour);
  out[t] = neighbour;
}

void count(bool atomic) {
  const rt::Shared<int32_t> counter = values();
  if (rt::thread_index() == 0) counter.store(0, 0);
  rt::sync_threads();
  if (atomic) {
    counter.atomic_add(0, 1);
  } else {
    counter.store(0, counter.load(0) + 1);
  }
  rt::sync_threads();
  out[rt::thread_index()] = counter.load(0);
}

// Atomic additions are ordered among themselves, not with a plain read.
void read_while_adding() {
  if (rt::thread_index() == 0) values().store(0, 0);
  rt::sync_threads();
  values().atomic_add(0, 1);
  out[rt::thread_index()] = values().load(0);
}

// Nor does an addition by the same thread make a plain write before it atomic.
void add_to_what_is_being_written() {
  if (rt::thread_index() == 0) values().store(0, 0);
  values().atomic_add(0, 1);
}

void remote(bool cluster_barrier) {
  const int t = rt::thread_index();
  values().store(t, t + 100 * rt::cluster_rank());
  if (cluster_barrier) {
    rt::cluster_sync();
  } else {
    rt::sync_threads();
  }
  const int other = (rt::cluster_rank() + 1) % rt::cluster_size();
  const int32_t seen = values().map_shared_rank(other).load(t);
  rt::cluster_sync();
  out[kThreads * rt::block_index() + t] = seen;
}

int32_t endless(int32_t depth) {
  volatile char frame[256] = {};
  return depth < 0 ? frame[0] : endless(depth + 1) + frame[1];
}

// A block that ends takes its shared memory along.
void remote_after_the_end() {
  const int t = rt::thread_index();
  values().store(t, t);
  rt::cluster_sync();
  if (rt::cluster_rank() == 0) return;
  rt::sync_threads();  // gives the other block time to end
  out[t] = values().map_shared_rank(0).load(t);
}

// The other way round: when threads run in ascending order, the reader happens to come first.
void remote_that_may_end() {
  const int t = rt::thread_index();
  values().store(t, t);
  rt::cluster_sync();
  if (rt::cluster_rank() == 0) out[t] = values().map_shared_rank(1).load(t);
}

void within_warp(bool barrier) {
  const int t = rt::thread_index();
  values().store(t, t);
  if (barrier) rt::sync_warp();
  out[t] = values().load(t ^ 1);
}

void warp_operations() {
  const int t = rt::thread_index();
  const uint32_t even = rt::ballot(t % 2 == 0);
  const int up = rt::shuffle_up(t, 1), crossed = rt::shuffle_xor(t, 5), first = rt::shuffle(t, 3);
  out[t] = static_cast<int32_t>(even == 0x55555555u) + 2 * (up == (t % 32 ? t - 1 : t)) + 4 * (crossed == (t ^ 5)) +
           8 * (first == t / 32 * 32 + 3);
}

const std::map<std::string, void (*)()> kKernels = {
    {"rotate", [] { rotate(true); }},
    {"overwrite", [] { overwrite(true); }},
    {"count", [] { count(true); }},
    {"remote", [] { remote(true); }},
    {"within-warp", [] { within_warp(true); }},
    {"warp-operations", [] { warp_operations(); }},
    {"missing-barrier", [] { rotate(false); }},
    {"missing-barrier-before-write", [] { overwrite(false); }},
    {"missing-atomic", [] { count(false); }},
    {"missing-warp-barrier", [] { within_warp(false); }},
    {"missing-cluster-barrier", [] { remote(false); }},
    {"add-to-what-is-being-written", [] { add_to_what_is_being_written(); }},
    {"read-while-adding", [] { read_while_adding(); }},
    {"remote-after-the-end", [] { remote_after_the_end(); }},
    {"remote-that-may-end", [] { remote_that_may_end(); }},
    {"uninitialised", [] { out[rt::thread_index()] = values().load(rt::thread_index()); }},
    {"shared-out-of-bounds", [] { values().store(rt::thread_index() + 1, 0); }},
    {"shared-too-small", [] { rt::dynamic_shared<int32_t>(0, 2 * kThreads).store(2 * rt::thread_index() + 1, 0); }},
    {"global-out-of-bounds", [] { out[2 * kThreads + rt::thread_index()] = 0; }},
    {"misaligned", [] { out[0] = rt::load_streaming(reinterpret_cast<rt::Quad<int32_t>*>(out + 1)).value[0]; }},
    {"endless-recursion", [] { out[0] = endless(rt::thread_index()); }},
    {"overflow", [] { out[rt::thread_index()] = INT32_MAX - 10 + rt::thread_index(); }},
    {"divergent-barrier",
     [] {
       if (rt::thread_index() != 5) rt::sync_threads();
     }},
    {"barriers-at-two-places",
     [] {
       if (rt::thread_index() < 32)
         rt::sync_threads();
       else
         rt::sync_threads();
     }},
    {"divergent-shuffle",
     [] {
       if (rt::thread_index() % 2) rt::shuffle_xor(1, 1);
     }},
    {"divergent-cluster-barrier",
     [] {
       if (rt::cluster_rank() == 0) rt::cluster_sync();
     }},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !kKernels.contains(argv[1])) return 2;
  const host::Schedule schedules[] = {
      {host::Order::kForward, 0}, {host::Order::kReverse, 0}, {host::Order::kRandom, 1}, {host::Order::kRandom, 2}};
  const int cluster =
      std::string(argv[1]).find("remote") + std::string(argv[1]).find("cluster") == 2 * std::string::npos ? 1 : 2;
  for (const host::Schedule& schedule : schedules) {
    const std::unique_ptr<int32_t[]> memory(new int32_t[2 * kThreads]());
    out = memory.get();
    host::Machine::get().launch(1, cluster, kThreads, 4 * kThreads, schedule, kKernels.at(argv[1]));
    int64_t sum = 0;
    for (int i = 0; i < 2 * kThreads; ++i) sum += static_cast<int64_t>(i + 1) * out[i];
    std::printf("%lld\n", static_cast<long long>(sum));
  }
}
