// A machine of thread blocks and clusters on one CPU thread: every CUDA thread is a fiber that runs until it waits.
//
// What it reports (to stderr, and the process ends with status 3):
//  - two accesses to shared memory of which one writes, by threads that no barrier has ordered (4 bytes at a time);
//  - shared memory that is read before it is written, or outside of its array, or after its block has ended, or with no
//    cluster barrier that makes its block wait for the reader before it ends;
//  - barriers, shuffles and ballots that not all threads of their scope reach, or reach at different places.
// Everything else is left to AddressSanitizer and UndefinedBehaviorSanitizer.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <vector>

#if !defined(__x86_64__)
#error "fibers are switched by x86-64 assembly"
#endif

// Saves the registers that a function must keep, exchanges stacks.
extern "C" void host_cuda_switch(void** save, void* stack);
asm(R"(
.text
.globl host_cuda_switch
.type host_cuda_switch, @function
host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_cuda_switch, .-host_cuda_switch
)");

namespace robattr_fast::host {

using Site = std::source_location;

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024, kGuard = 4096;
constexpr int kNobody = -1, kMany = -2;

// In which order threads run between two barriers, and clusters one after another.
enum class Order { kForward, kReverse, kRandom };

struct Schedule {
  Order order;
  uint64_t seed;
};

[[noreturn]] inline void report(const char* what, const char* detail) {
  std::fprintf(stderr, "host_cuda: %s: %s\n", what, detail);
  std::fflush(stderr);
  _exit(3);
}

// Who accessed four bytes of shared memory last: one thread, or many that are not ordered among themselves.
struct Access {
  int thread = kNobody, block = kNobody;
  uint32_t block_epoch = 0, cluster_epoch = 0, warp_epoch = 0;
  bool atomic = false;
};

struct Cell {
  Access write, read;
};

struct Block {
  std::unique_ptr<char[]> memory;  // of exactly the size asked for, so that its bounds are guarded
  std::vector<Cell> shadow;
  int size = 0, running = 0;
  uint32_t epoch = 0;
};

enum class Wait { kNone, kThreads, kCluster, kWarp };
inline const char* name_of(Wait wait) {
  constexpr const char* names[] = {"nothing", "sync_threads", "cluster_sync", "a warp operation"};
  return names[static_cast<int>(wait)];
}

// Threads that wait for each other.
struct Group {
  int size = 0, arrived = 0;
  std::vector<int> members;
};

struct Warp {
  uint64_t value[2][kWarp] = {};
  uint32_t epoch = 0;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  int thread = 0, block = 0, warp = 0;  // in the block; in the cluster; in the cluster
  int turn = 0;                         // of the warp's two sets of values
  bool finished = false;
  Wait wait = Wait::kNone;
  Site site;
};

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  int threads = 0, cluster = 0, clusters = 0, cluster_index = 0;
  Fiber* self = nullptr;
  std::vector<Block> blocks;

  // Runs body in every thread of `count` clusters of `size` blocks.
  void launch(int count, int size, int block_threads, int shared_bytes, Schedule schedule, std::function<void()> body) {
    if (block_threads % kWarp != 0) report("launch", "blocks of whole warps are supported");
    clusters = count;
    cluster = size;
    threads = block_threads;
    body_ = std::move(body);
    random_.seed(schedule.seed);
    std::vector<int> order = ordered(count, schedule.order);
    for (const int index : order) run_cluster(index, shared_bytes, schedule.order);
  }

  // The last to arrive releases all.
  void wait(Wait kind, const Site& site) {
    Group& group = group_of(kind, *self);
    self->wait = kind;
    self->site = site;
    if (++group.arrived < group.size) {
      to_scheduler();
      return;
    }
    for (const int member : group.members) {
      Fiber& other = fibers_[member];
      if (other.wait != kind || other.site.line() != site.line() || !same_file(other.site, site)) {
        char detail[512];
        std::snprintf(detail, sizeof detail, "thread %d of block %d is at %s:%u, thread %d of block %d at %s:%u",
                      self->thread, self->block, site.file_name(), site.line(), other.thread, other.block,
                      other.site.file_name(), other.site.line());
        report("divergent barrier", detail);
      }
      other.wait = Wait::kNone;
    }
    group.arrived = 0;
    if (kind == Wait::kThreads) ++blocks[self->block].epoch;
    if (kind == Wait::kCluster) {
      ++cluster_epoch_;
      for (Block& block : blocks) ++block.epoch;
    }
  }

  void sync_warp(const Site& site) {
    const uint32_t before = warps_[self->warp].epoch;
    wait(Wait::kWarp, site);
    if (warps_[self->warp].epoch == before) ++warps_[self->warp].epoch;
  }

  // Hands over value; returns those of all lanes.
  const uint64_t* exchange(uint64_t value, const Site& site) {
    uint64_t* values = warps_[self->warp].value[self->turn];
    self->turn ^= 1;
    values[self->thread % kWarp] = value;
    wait(Wait::kWarp, site);
    return values;
  }

  enum class Kind { kRead, kWrite, kAtomic };

  // Notes an access to bytes [offset, offset + size) of a block's shared memory; reports a race.
  void access(int block, int64_t offset, int64_t size, Kind kind) {
    if (blocks[block].running == 0) report("shared memory", "its block has ended");
    for (int64_t i = offset / 4; i <= (offset + size - 1) / 4; ++i) {
      Cell& cell = blocks[block].shadow[i];
      if (kind != Kind::kWrite && cell.write.thread == kNobody)
        race("read before it was written", block, i, cell.write);
      if (unordered(cell.write) && !(kind == Kind::kAtomic && cell.write.atomic)) {
        race(kind == Kind::kRead ? "read after write" : "write after write", block, i, cell.write);
      }
      if (kind == Kind::kRead) {
        note(cell.read, false);
      } else {
        if (unordered(cell.read)) race("write after read", block, i, cell.read);
        note(cell.write, kind == Kind::kAtomic);
      }
    }
  }

 private:
  // Names are compared only where their addresses differ: this is asked of every thread at every barrier.
  static bool same_file(const Site& a, const Site& b) {
    return a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0;
  }

  std::vector<int> ordered(int count, Order order) {
    std::vector<int> indices(count);
    for (int i = 0; i < count; ++i) indices[i] = order == Order::kReverse ? count - 1 - i : i;
    if (order == Order::kRandom) std::shuffle(indices.begin(), indices.end(), random_);
    return indices;
  }

  void run_cluster(int index, int shared_bytes, Order order) {
    cluster_index = index;
    cluster_epoch_ = 0;
    const int count = cluster * threads, warps_per_block = threads / kWarp;
    blocks.clear();
    blocks.resize(cluster);
    for (Block& block : blocks) {
      block.memory.reset(new char[shared_bytes]);
      std::memset(block.memory.get(), 0xA5, shared_bytes);
      block.shadow.resize((shared_bytes + 3) / 4);
      block.size = shared_bytes;
      block.running = threads;
    }
    warps_.assign(cluster * warps_per_block, Warp());
    in_cluster_ = Group{count, 0, {}};
    in_block_.assign(cluster, Group{threads, 0, {}});
    in_warp_.assign(warps_.size(), Group{kWarp, 0, {}});
    fibers_.resize(count);
    for (int i = 0; i < count; ++i) {
      fibers_[i] = Fiber();
      fibers_[i].stack = stack(i);
      fibers_[i].thread = i % threads;
      fibers_[i].block = i / threads;
      fibers_[i].warp = i / kWarp;
      in_cluster_.members.push_back(i);
      in_block_[i / threads].members.push_back(i);
      in_warp_[i / kWarp].members.push_back(i);
      start(fibers_[i]);
    }
    std::vector<int> turns = ordered(count, order);
    int finished = 0;
    while (finished < count) {
      bool progress = false;
      for (const int i : turns) {
        Fiber& fiber = fibers_[i];
        if (fiber.finished || fiber.wait != Wait::kNone) continue;
        progress = true;
        resume(fiber);
        finished += fiber.finished;
      }
      if (!progress) report_deadlock();
      if (order == Order::kRandom) std::shuffle(turns.begin(), turns.end(), random_);
    }
  }

  // The block of this thread ends, and its shared memory with it.
  void check_end() const {
    const Block& block = blocks[self->block];
    for (size_t i = 0; i < block.shadow.size(); ++i) {
      for (const Access& access : {block.shadow[i].read, block.shadow[i].write}) {
        if (access.thread != kNobody && access.block != self->block && access.cluster_epoch >= cluster_epoch_)
          race("its block ends while another accesses it", self->block, static_cast<int64_t>(i), access);
      }
    }
  }

  char* stack(size_t i) {
    while (stacks_.size() <= i) {
      void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) report("launch", "no memory for stacks");
      mprotect(memory, kGuard, PROT_NONE);  // a stack that overflows must not reach the next one
      stacks_.push_back(static_cast<char*>(memory));
    }
    return stacks_[i];
  }

  static void enter() {
    Machine& machine = get();
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom_, &machine.scheduler_size_);
    machine.body_();
    machine.self->finished = true;
    if (--machine.blocks[machine.self->block].running == 0) machine.check_end();
    void* ignored;
    __sanitizer_start_switch_fiber(nullptr, machine.scheduler_bottom_, machine.scheduler_size_);
    host_cuda_switch(&ignored, machine.scheduler_stack_);
    std::abort();
  }

  void start(Fiber& fiber) {
    // what host_cuda_switch pops: six registers and the address to return to; a function is entered at 16 n + 8
    // Equal offsets in all stacks would share few sets of the cache.
    auto* top = reinterpret_cast<void**>(fiber.stack + kStack - (fiber.thread % 32 + 7 * fiber.warp) % 61 * 256) - 2;
    *top = reinterpret_cast<void*>(&Machine::enter);
    fiber.stack_pointer = top - 6;
  }

  void resume(Fiber& fiber) {
    self = &fiber;
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
    host_cuda_switch(&scheduler_stack_, fiber.stack_pointer);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  }

  void to_scheduler() {
    Fiber& fiber = *self;
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, scheduler_bottom_, scheduler_size_);
    host_cuda_switch(&fiber.stack_pointer, scheduler_stack_);
    __sanitizer_finish_switch_fiber(fake, &scheduler_bottom_, &scheduler_size_);
  }

  Group& group_of(Wait kind, const Fiber& fiber) {
    if (kind == Wait::kThreads) return in_block_[fiber.block];
    return kind == Wait::kCluster ? in_cluster_ : in_warp_[fiber.warp];
  }

  [[noreturn]] void report_deadlock() {
    char detail[512];
    for (const Fiber& fiber : fibers_) {
      if (fiber.finished) continue;
      const Group& group = group_of(fiber.wait, fiber);
      std::snprintf(detail, sizeof detail, "%d of %d threads wait for %s at %s:%u (thread %d of block %d)",
                    group.arrived, group.size, name_of(fiber.wait), fiber.site.file_name(), fiber.site.line(),
                    fiber.thread, fiber.block);
      break;
    }
    report("divergent barrier", detail);
  }

  // Whether no barrier lies between an access and now.
  bool unordered(const Access& access) const {
    if (access.thread == kNobody || access.thread == id()) return false;
    if (access.block != self->block) return access.cluster_epoch >= cluster_epoch_;
    if (access.block_epoch < blocks[self->block].epoch) return false;
    const bool same_warp = access.thread >= 0 && access.thread / kWarp == self->warp;
    return !(same_warp && access.warp_epoch < warps_[self->warp].epoch);
  }

  int id() const { return self->block * threads + self->thread; }

  void note(Access& access, bool atomic) const {
    const bool joins = unordered(access);
    // A thread's own plain write goes on to count until a barrier: an addition after it does not make it atomic.
    const bool own = access.thread == id() && access.block_epoch == blocks[self->block].epoch;
    if (own && !access.atomic) atomic = false;
    const bool same_block = access.block == self->block;
    access = {joins ? kMany : id(),      joins && !same_block ? kMany : self->block,
              blocks[self->block].epoch, cluster_epoch_,
              warps_[self->warp].epoch,  atomic};
  }

  [[noreturn]] void race(const char* what, int block, int64_t word, const Access& other) const {
    char detail[512];
    std::snprintf(detail, sizeof detail,
                  "%s: byte %lld of block %d, by thread %d of block %d and thread %d of the cluster", what,
                  static_cast<long long>(4 * word), block, self->thread, self->block, other.thread);
    report("race on shared memory", detail);
  }

  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<Group> in_block_, in_warp_;
  Group in_cluster_;
  std::vector<char*> stacks_;
  uint32_t cluster_epoch_ = 0;
  void* scheduler_stack_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
  std::mt19937_64 random_;
};

}  // namespace robattr_fast::host
