// What the kernels take from CUDA, and the one way to launch them. With VIDFAST_EMULATION the same names come from
// tests/emulation/emulation.h, which runs the kernels on the host; so no other file names a CUDA header, and what
// is not used here (inline PTX, spin-waits, textures) cannot be used in a kernel.
#pragma once

#ifdef VIDFAST_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "chunks.h"

namespace vidfast::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory; the kernels use no other.
__device__ inline unsigned char* shared_memory() {
#ifdef VIDFAST_EMULATION
  return emulation::shared_memory();
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#endif
}

// Throws if `status` is an error; `what` says what was asked for.
inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error("CUDA: " + what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

// How many blocks of one kernel each device holds at once, asked for once.
class Residency {
 public:
  template <class Args>
  int64_t blocks(void (*kernel)(Args)) {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    std::atomic<int>& known = known_[device % kDevices];
    if (device < kDevices && known.load(std::memory_order_relaxed) > 0) return known.load(std::memory_order_relaxed);
    int processors = 0, each = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, reinterpret_cast<const void*>(kernel), kThreads, 0),
          "occupancy");
    const int all = processors * (each > 0 ? each : 1);
    if (device < kDevices) known.store(all, std::memory_order_relaxed);
    return all;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int> known_[kDevices] = {};
};

// Whether the current device can start a kernel while the one before it ends, asked for once.
inline bool can_overlap() {
#ifdef VIDFAST_EMULATION
  return true;
#else
  static const bool can = [] {
    int device = 0, major = 0, driver = 0;
    return cudaGetDevice(&device) == cudaSuccess && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030 &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
  }();
  return can;
#endif
}

// In a kernel: what is launched behind it with `overlap` may start as soon as all blocks have come here or ended.
__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
// In a kernel launched with `overlap`: the one before has ended, and what it wrote is seen.
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

__device__ inline int64_t quotient(int64_t n, const Divisor& d) {
  return static_cast<int64_t>(__umul64hi(2 * static_cast<uint64_t>(n), d.factor) >> d.shift);
}

// Adds one to a counter, behind all that this thread wrote and before all that its block reads after a barrier; what it
// was. A fence and an atomicAdd would order this thread against the whole device, which takes longer.
__device__ inline unsigned count_in(unsigned* counter) {
#ifdef __CUDA_ARCH__
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
#else
  return atomicAdd(counter, 1u);
#endif
}

// Asks for the 128 bytes around p, which may be unallocated, to be in the second-level cache soon.
__device__ inline void prefetch(const void* p) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  (void)p;
#endif
}

// Launches kernel(args) on blocks of kThreads threads. overlap: it may start before the kernel before it has ended.
template <class Args>
void launch(const char* name, void (*kernel)(Args), int64_t blocks, size_t shared, cudaStream_t stream,
            const Args& args, bool overlap = false) {
  const unsigned grid = static_cast<unsigned>(blocks);
#ifdef VIDFAST_EMULATION
  const cudaError_t status = emulation::launch(kernel, args, grid, kThreads, shared, overlap);
  (void)stream;
#else
  void* parameters[] = {const_cast<Args*>(&args)};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), parameters);
#endif
  if (status != cudaSuccess)
    check(status, std::string(name) + "<<<" + std::to_string(blocks) + ", " + std::to_string(kThreads) + ", " +
                      std::to_string(shared) + ">>>(" + describe(args) + ")");
}

}  // namespace vidfast::cuda
