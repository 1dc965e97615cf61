// CUDA's names on the host: what csrc/cuda/device.h takes where VIDFAST_EMULATION is defined.
//
// A launch runs its blocks on one thread of the host, a few blocks at a time, each CUDA thread as a fiber. Blocks and
// the threads within them run in an order drawn at random, now and then one block far ahead of the others, so that a
// result which depends on it shows. A fiber gives way only at a barrier, a shuffle or an atomic: between these,
// threads run one after another.
//
// Shown: wrong indices (with AddressSanitizer; dynamic shared memory is exactly as large as asked for), missing
// barriers, a wrong count of threads at a barrier, a shuffle in which lanes are missing, reads of shared memory that
// nobody wrote (it starts as NaN), misaligned vectors (with UBSan), sums that depend on the order of blocks.
// Not shown: missing memory fences, races between threads of a warp that hardware runs at once, streams, timing.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "cpu/half.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Set for the fiber that is running.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- bfloat16 and half: the bits and conversions that the CPU back end tests on their own

using __nv_bfloat16 = vidfast::cpu::bf16;
using __half = vidfast::cpu::f16;
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline float __bfloat162float(__nv_bfloat16 x) { return vidfast::cpu::to_float(x); }
inline float __half2float(__half x) { return vidfast::cpu::to_float(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return vidfast::cpu::to_bf16(x); }
inline __half __float2half_rn(float x) { return vidfast::cpu::to_f16(x); }

// ---- the runtime

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
struct cudaFuncAttributes {};
#define CUDART_VERSION 0

namespace emulation {

// A launch as a test is given it.
struct Launch {
  const void* kernel;  // the function on the host
  dim3 grid;
  int threads;
  size_t shared;
  bool overlap;
  std::string arguments;  // the bytes of its one parameter
};

// What tests turn. `fault`: an error that the probes are to see; `launch_fault`: one that every launch meets.
struct Machine {
  uint64_t seed = 1;
  int device = 0;      // the current one; how many blocks it holds is asked for once
  int processors = 3;  // of it; few, so that small problems, too, have more chunks than blocks
  int resident = 2;    // blocks that run at once
  cudaError_t fault = cudaSuccess;
  cudaError_t launch_fault = cudaSuccess;
  long launches = 0;  // counted
  long memsets = 0;
  std::function<void(const Launch&)> instead;  // is given every launch, which is then not run here
};
Machine& machine();

cudaError_t launch(const std::function<void()>& kernel, unsigned blocks, int threads, size_t shared);
template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, unsigned blocks, int threads, size_t shared, bool overlap) {
  if (!machine().instead) return launch([&] { kernel(args); }, blocks, threads, shared);
  machine().instead({reinterpret_cast<const void*>(kernel),
                     {blocks, 1, 1},
                     threads,
                     shared,
                     overlap,
                     std::string(reinterpret_cast<const char*>(&args), sizeof(Args))});
  return cudaSuccess;
}
// Why the last launch failed.
const char* failure();

unsigned char* shared_memory();
void barrier();
int barrier_or(int value);
uint64_t shuffle_xor(unsigned lanes, uint64_t value, int distance);
void give_way();

}  // namespace emulation

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::machine().device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  const cudaError_t fault = emulation::machine().fault;
  return fault == cudaErrorInsufficientDriver || fault == cudaErrorNoDevice ? fault : cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 11040;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::machine().processors : 7;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return emulation::machine().fault; }
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (emulation::machine().instead) throw std::logic_error("a memset among launches that a test is given");
  std::memset(p, value, bytes);
  ++emulation::machine().memsets;
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorLaunchFailure ? emulation::failure() : "an error that a test asked for";
}

// ---- what kernels call

inline void __syncthreads() { emulation::barrier(); }
inline int __syncthreads_or(int value) { return emulation::barrier_or(value); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  emulation::give_way();
  const unsigned old = *p;
  *p = old + value;
  emulation::give_way();
  return old;
}
inline double __ldcg(const double* p) { return *p; }
inline double __shfl_xor_sync(unsigned lanes, double value, int distance) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  bits = emulation::shuffle_xor(lanes, bits, distance);
  std::memcpy(&value, &bits, 8);
  return value;
}
