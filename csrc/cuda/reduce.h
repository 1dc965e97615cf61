// What the kernels share: sums over threads, and the numbers of one channel.
#pragma once

#include "args.h"

namespace vidfast::cuda {

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

// The sum of `value` over the threads `stride` apart, in thread `i` < stride; others get something else.
// scratch: [kThreads]. Called by all threads; stride is a power of two.
__device__ inline double strided_sum(double* scratch, double value, int stride) {
  const int i = threadIdx.x;
  scratch[i] = value;
  for (int half = kThreads / 2; half >= stride; half /= 2) {
    __syncthreads();
    if (i < half) scratch[i] += scratch[i + half];
  }
  __syncthreads();
  const double sum = scratch[i < stride ? i : 0];
  __syncthreads();
  return sum;
}

// The sum of `value` over the block, in thread 0; others get something else. scratch: [kWarps]. Called by all threads.
__device__ inline double block_sum(double* scratch, double value) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += scratch[w];
  __syncthreads();
  return sum;
}

// Whether this block is the last of `expected` to come here; if so it sees what thread 0 of each wrote before.
// Called by all threads of a block.
__device__ inline bool last_to_arrive(unsigned* counter, unsigned expected) {
  bool last = false;
  if (threadIdx.x == 0) last = count_in(counter) == expected - 1;
  return __syncthreads_or(last) != 0;
}

// Whether any gradient of the activations is wanted; a backward without one is another kernel.
template <bool Sum>
__device__ inline bool any_gradient(const Args& a) {
  return !Sum || a.grad_mean.data != nullptr;
}

// M and k of a call, on their way where they are on the device alone.
__device__ inline double count_of(const Args& a) { return a.totals == nullptr ? a.m : a.totals[0]; }
__device__ inline double factor_of(const Args& a) { return a.totals == nullptr ? a.k : a.totals[1]; }

// alpha of a channel, k and, without sums, the incoming gradient, on their way.
template <bool Sum>
struct Scale {
  const Args& a;
  Raw alpha, g;
  double k;

  __device__ Scale(const Args& args, int64_t c)
      : a(args),
        alpha(args.alpha, args.alpha_dtype, c),
        g(Sum ? args.alpha : args.g, Sum ? args.alpha_dtype : args.g_dtype, Sum ? c : 0),
        k(factor_of(args)) {}
  // k, times the incoming gradient where there is one.
  __device__ double gk() const { return Sum ? k : g.value() * k; }
  // That over the channel's variance; what else there is of the channel is not computed.
  __device__ double value() const { return gk() / channel_of(alpha.value(), a.eps).variance; }
};

// Backward: d/d alpha of a channel, by one thread, if it is wanted.
__device__ inline void write_grad_alpha(const Args& a, int64_t c, double gk) {
  if (a.grad_alpha_out == nullptr) return;
  const Channel ch = channel_of(Raw(a.alpha, a.alpha_dtype, c).value(), a.eps);
  store_as(a.grad_alpha_out, a.alpha_dtype, c, gk * channel_grad_alpha(ch, a.saved_sum_sq[c], count_of(a)));
}

// A sweep with sums begins: the finish may come, will count from zero, and wants alpha of the first channels soon.
template <bool Sum>
__device__ inline void begin_sweep(const Args& a) {
  if constexpr (Sum) {
    let_next_start();
    if (blockIdx.x > 0) return;
    if (threadIdx.x == 0) *a.counter = 0;
    if (threadIdx.x * 128 < a.alpha_bytes) prefetch(static_cast<const unsigned char*>(a.alpha) + threadIdx.x * 128);
  }
}

// The 128-byte lines of a warp's first batch of loads: on their way while the channel's variance is computed. A batch
// has up to 32 lines, one for each lane: `mean` and `target` are called with a line's vector and the line in it, and
// give its address, or null beyond the end.
template <class M, class T, class Mean, class Target>
__device__ inline void prefetch_batch(int lane, const Mean& mean, const Target& target) {
  using P = Pair<M, T>;
  if constexpr (!P::any) {
    constexpr int of_mean = kWarp * P::width * static_cast<int>(sizeof(M)) / 128;  // lines of a vector a lane
    constexpr int of_target = kWarp * P::width * static_cast<int>(sizeof(T)) / 128;
    static_assert(P::batch * (of_mean + of_target) <= kWarp, "a line a lane");
    const int other = lane - P::batch * of_mean;
    const unsigned char* line = nullptr;
    if (other < 0)
      line = mean(lane / of_mean, lane % of_mean);
    else if (other < P::batch * of_target)
      line = target(other / of_target, other % of_target);
    if (line != nullptr) prefetch(line);
  }
}

}  // namespace vidfast::cuda
