// From partial sums to the loss and d/d alpha: the last block to finish does it, in an order that is the same
// whichever block that is.
#pragma once

#include "args.h"

namespace vidfast::cuda {

// Enough loads in flight to hide a good part of their latency.
constexpr int kReduceUnroll = 8;

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int d = kWarp / 2; d > 0; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

// Whether this block is the last of `expected` to come here; if so it sees what all of them wrote before.
// Called by all threads of a block.
__device__ inline bool last_to_arrive(unsigned* counter, unsigned expected) {
  __threadfence();  // what this thread wrote comes before the count
  __syncthreads();  // of all threads
  const int last = __syncthreads_or(threadIdx.x == 0 && atomicAdd(counter, 1u) == expected - 1);
  if (last) __threadfence();  // and what is read now comes after it
  return last != 0;
}

__device__ inline Channel channel(const Args& a, int64_t c) {
  return channel_of(load_as<double>(a.alpha, a.alpha_dtype, c), a.eps);
}

// The variance alone: what is not asked for is not computed.
__device__ inline double variance(const Args& a, int64_t c) { return channel(a, c).variance; }

// What one thread does for each channel: its numbers for the last block, or (backward) d/d alpha at once.
template <bool Sum>
__device__ inline void once_per_channel(const Args& a, int64_t c, double gk) {
  if constexpr (Sum)
    a.known[c] = channel(a, c);
  else if (a.grad_alpha_out != nullptr)
    store_as(a.grad_alpha_out, a.alpha_dtype, c, gk * channel_grad_alpha(channel(a, c), a.saved_sum_sq[c], a.m));
}

// k, times the incoming gradient where there is one.
template <bool Sum>
__device__ inline double incoming(const Args& a) {
  if constexpr (Sum)
    return a.k;
  else
    return load_as<double>(a.g, a.g_dtype, 0) * a.k;
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

// Writes all that depends on the sums S_c. share(c, lane, lanes) is one lane's part of S_c. Called by all threads
// of the last block, with kThreads doubles of shared memory that nobody uses any more.
template <class Share>
__device__ inline void finish(const Args& a, int64_t shares, const Share& share) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  // As many lanes as there are idle threads and shares for them.
  int lanes = 1;
  while (lanes < kThreads && lanes < shares && 2 * lanes * a.channels <= kThreads) lanes *= 2;
  const int abreast = kThreads / lanes;
  const int lane = threadIdx.x / abreast;
  double loss = 0;
  for (int64_t first = 0; first < a.channels; first += abreast) {
    const int64_t c = first + threadIdx.x % abreast;
    double s = c < a.channels ? share(c, lane, lanes) : 0.0;
    if (lanes > 1) s = strided_sum(scratch, s, abreast);
    if (lane == 0 && c < a.channels) {
      const Channel ch{__ldcg(&a.known[c].variance), __ldcg(&a.known[c].log_variance), __ldcg(&a.known[c].sigmoid)};
      if (a.sum_sq != nullptr) a.sum_sq[c] = s;
      if (a.grad_alpha != nullptr) a.grad_alpha[c] = a.k * channel_grad_alpha(ch, s, a.m);
      loss += channel_loss(ch, s, a.m);
    }
  }
  loss = strided_sum(scratch, loss, 1);
  if (threadIdx.x == 0) store_as(a.loss, a.loss_dtype, 0, total_loss(loss, a.k, a.n, a.full));
}

constexpr size_t kFinishBytes = kThreads * sizeof(double);

}  // namespace vidfast::cuda
