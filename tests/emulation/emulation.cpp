// The fibers behind emulation.h.
#include "emulation.h"

#include <sys/mman.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(...) __VA_ARGS__
#else
#define ASAN(...)
#endif

#if defined(__x86_64__)
// Saves the callee's registers on the running stack, leaves its pointer in *from, and goes on with another stack.
extern "C" void vidfast_switch_stack(void** from, void* to);
asm(R"(
.text
.globl vidfast_switch_stack
.hidden vidfast_switch_stack
.type vidfast_switch_stack, @function
vidfast_switch_stack:
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
.size vidfast_switch_stack, .-vidfast_switch_stack
)");
#else
#include <ucontext.h>
#endif

namespace emulation {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 << 10;  // reserved; touched as far as it is used

struct Block;

struct Fiber {
  enum State { ready, at_barrier, at_shuffle, done } state = ready;
  Block* block = nullptr;
  int index = 0;
  char* stack = nullptr;
#if defined(__x86_64__)
  void* top = nullptr;
#else
  ucontext_t context;
#endif
  ASAN(void* fake = nullptr;)
};

struct Warp {
  uint64_t value[kLanes];
  int arrived = 0;
};

struct Block {
  unsigned index = 0;
  std::vector<Fiber*> ready;
  int threads = 0, left = 0, waiting = 0;
  int votes = 0, verdict = 0;
  std::unique_ptr<unsigned char[]> shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
};

struct Random {
  uint64_t state = 1;
  uint64_t operator()(uint64_t n) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull % n;
  }
};

// One launch. It lives on the stack of the host's thread that runs it.
struct Run {
  explicit Run(const std::function<void()>& k) : kernel(k) {}
  const std::function<void()>& kernel;
  Random random;
  Fiber* running = nullptr;
  bool redraw = false;
  std::string error;
#if defined(__x86_64__)
  void* host = nullptr;
#else
  ucontext_t host;
#endif
  ASAN(const void* host_stack = nullptr; size_t host_size = 0; void* host_fake = nullptr;)
};

Run* run;
std::string last_failure;
std::mutex one_launch;

struct Stacks {
  std::vector<char*> all;
  char* take(size_t i) {
    while (all.size() <= i) {
      void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      all.push_back(static_cast<char*>(p));
    }
    ASAN(__asan_unpoison_memory_region(all[i], kStack);)
    return all[i];
  }
};
Stacks stacks;

void switch_to_host() {
  Fiber* self = run->running;
  ASAN(__sanitizer_start_switch_fiber(self->state == Fiber::done ? nullptr : &self->fake, run->host_stack,
                                      run->host_size);)
#if defined(__x86_64__)
  vidfast_switch_stack(&self->top, run->host);
#else
  swapcontext(&self->context, &run->host);
#endif
  ASAN(__sanitizer_finish_switch_fiber(self->fake, &run->host_stack, &run->host_size);)
}

void body() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, &run->host_stack, &run->host_size);)
  run->kernel();
  Fiber* self = run->running;
  self->state = Fiber::done;
  --self->block->left;
  switch_to_host();
  std::abort();  // nobody comes back here
}

void prepare(Fiber& f) {
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack + kStack);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&body);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.top = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, body, 0);
#endif
}

void switch_to(Fiber* f) {
  run->running = f;
  threadIdx.x = static_cast<unsigned>(f->index);
  threadIdx.y = threadIdx.z = 0;
  blockIdx.x = f->block->index;
  blockIdx.y = blockIdx.z = 0;
  ASAN(__sanitizer_start_switch_fiber(&run->host_fake, f->stack, kStack);)
#if defined(__x86_64__)
  vidfast_switch_stack(&run->host, f->top);
#else
  swapcontext(&run->host, &f->context);
#endif
  ASAN(__sanitizer_finish_switch_fiber(run->host_fake, nullptr, nullptr);)
  run->running = nullptr;
}

void wait(Fiber::State state) {
  run->running->state = state;
  switch_to_host();
}

void release(Fiber& f) {
  f.state = Fiber::ready;
  f.block->ready.push_back(&f);
}

// Releases everybody at the barrier, if everybody is there.
void meet(Block& b) {
  if (b.waiting < b.threads) return;
  b.waiting = 0;
  b.verdict = b.votes;
  b.votes = 0;
  for (Fiber& f : b.fibers) release(f);
}

void start(Block& b, unsigned index, int threads, size_t shared, size_t slot) {
  b.index = index;
  b.threads = b.left = threads;
  b.waiting = b.votes = b.verdict = 0;
  b.shared.reset(new unsigned char[shared]);
  std::memset(b.shared.get(), 0xff, shared);  // NaN in every floating-point type
  b.fibers.assign(threads, Fiber{});
  b.warps.assign((threads + kLanes - 1) / kLanes, Warp{});
  for (int i = 0; i < threads; ++i) {
    Fiber& f = b.fibers[i];
    f.block = &b;
    f.index = i;
    f.stack = stacks.take(slot * threads + i);
    prepare(f);
    b.ready.push_back(&f);
  }
}

std::string stuck(const std::vector<Block>& blocks) {
  for (const Block& b : blocks) {
    if (b.left == 0) continue;
    int at_shuffle = 0;
    for (const Fiber& f : b.fibers) at_shuffle += f.state == Fiber::at_shuffle;
    return "block " + std::to_string(b.index) + " is stuck: of its " + std::to_string(b.threads) + " threads " +
           std::to_string(b.waiting) + " wait at a barrier, " + std::to_string(at_shuffle) + " in a shuffle, " +
           std::to_string(b.threads - b.left) + " have ended";
  }
  return "";
}

}  // namespace

Machine& machine() {
  static Machine m;
  return m;
}

const char* failure() { return last_failure.c_str(); }

cudaError_t launch(const std::function<void()>& kernel, unsigned blocks, int threads, size_t shared) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (blocks == 0 || shared > 48 << 10) return cudaErrorInvalidConfiguration;
  Machine& m = machine();
  if (m.launch_fault != cudaSuccess) return m.launch_fault;
  ++m.launches;
  Run here(kernel);
  here.random.state = m.seed * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(m.launches);
  run = &here;
  gridDim.x = blocks;
  blockDim.x = static_cast<unsigned>(threads);

  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) {
    const uint64_t j = here.random(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  std::vector<Block> resident(std::min<size_t>(blocks, static_cast<size_t>(m.resident)));
  size_t next = 0;
  for (size_t slot = 0; slot < resident.size(); ++slot) start(resident[slot], order[next++], threads, shared, slot);
  // One block runs for a while, short or longer than it lives, or until it speaks to others, then another.
  constexpr int kWhile[] = {1, 1 << 8, 1 << 14};
  size_t slot = 0;
  for (int64_t left = 0; here.error.empty(); --left) {
    if (left <= 0 || here.redraw || resident[slot].ready.empty()) {
      here.redraw = false;
      left = kWhile[here.random(3)];
      slot = here.random(resident.size());
      for (size_t tried = 0; tried < resident.size() && resident[slot].ready.empty(); ++tried)
        slot = (slot + 1) % resident.size();
    }
    Block& b = resident[slot];
    if (b.ready.empty()) break;
    const size_t i = here.random(b.ready.size());
    Fiber* f = b.ready[i];
    b.ready[i] = b.ready.back();
    b.ready.pop_back();
    switch_to(f);
    if (b.left == 0 && next < order.size()) start(b, order[next++], threads, shared, slot);
  }
  if (here.error.empty()) here.error = stuck(resident);
  run = nullptr;
  last_failure = here.error;
  return last_failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

unsigned char* shared_memory() { return run->running->block->shared.get(); }

void barrier() { barrier_or(0); }

int barrier_or(int value) {
  Block& b = *run->running->block;
  b.votes |= value;
  ++b.waiting;
  Fiber* self = run->running;
  self->state = Fiber::at_barrier;
  meet(b);
  switch_to_host();
  return b.verdict;
}

uint64_t shuffle_xor(unsigned lanes, uint64_t value, int distance) {
  Fiber* self = run->running;
  Warp& w = self->block->warps[self->index / kLanes];
  const int lane = self->index % kLanes;
  // All lanes write, meet, read, and meet again before the next may write.
  uint64_t got = 0;
  for (int round = 0; round < 2; ++round) {
    if (round == 0) w.value[lane] = value;
    if (lanes != 0xffffffffu) run->error = "a shuffle of fewer than all lanes";
    if (++w.arrived == kLanes) {
      w.arrived = 0;
      for (int i = 0; i < kLanes; ++i) release(self->block->fibers[self->index / kLanes * kLanes + i]);
      switch_to_host();
    } else {
      wait(Fiber::at_shuffle);
    }
    if (round == 0) got = w.value[lane ^ distance];
  }
  return got;
}

void give_way() {
  run->redraw = true;
  release(*run->running);
  switch_to_host();
}

}  // namespace emulation
