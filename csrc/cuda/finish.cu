// From the partial sums of a sweep to the loss and d/d alpha, in an order that follows from the shape alone.
//
// A kernel of its own behind the sweep: one block where there is little to add, else as many as make it short. A
// block takes neighbouring channels, some threads each, and computes their logarithms while the sums are on their
// way. Of several blocks, the last to come adds the losses of all.
#include "reduce.h"

namespace vidfast::cuda {
namespace {

// Loads in flight in a thread.
constexpr int kReduceUnroll = 8;

// Of rows whose runs are cut by tiles: the sums of one run in the first row chunk. There is one of them, and `more`.
struct Parts {
  const double* first;
  int more;

  __device__ Parts(const Args& a, int64_t run) {
    const int64_t begin = run * a.inner;
    const int64_t tile = begin >> a.rows.tile_bits;
    first = a.partials + run + tile;
    more = static_cast<int>(((begin + a.inner - 1) >> a.rows.tile_bits) - tile);
  }
  // Those of channel c number i, counted over the joined rows of all row chunks.
  __device__ static Parts number(const Args& a, int64_t c, int i) {
    const unsigned join = static_cast<unsigned>(a.rows.join);
    const unsigned chunk = static_cast<unsigned>(i) / join;
    Parts parts(a, (static_cast<unsigned>(i) - chunk * join) * a.channels + c);
    parts.first += chunk * a.rows.sums;
    return parts;
  }
};

// One thread's part of S_c: of the partial sums of channel c those number `lane`, lane + deep, ..., some at a time.
// Cut: of rows whose runs are cut by tiles; else the partial sums are a matrix [depth, C].
template <bool Cut>
struct Share {
  const Args& a;
  int64_t c;
  int depth, lane;
  double x[kReduceUnroll], y[kReduceUnroll];  // on their way

  __device__ Share(const Args& args, int64_t channel, int which)
      : a(args), c(channel), depth(static_cast<int>(args.blocks.depth)), lane(which) {}

  // All loads without a condition, so that none waits for another: beyond the end the last sum again.
  __device__ void load(int first) {
    if (Cut && a.rows.join > 1) {
#pragma unroll
      for (int u = 0; u < kReduceUnroll; ++u) {
        const Parts parts = Parts::number(a, c, place(first, u));
        x[u] = parts.first[0];
        y[u] = parts.first[parts.more > 0 ? 1 : 0];
        if (parts.more == 0) y[u] = 0;
      }
    } else if constexpr (Cut) {
      const Parts parts(a, c);
      const double* second = parts.first + (parts.more > 0 ? 1 : 0);
#pragma unroll
      for (int u = 0; u < kReduceUnroll; ++u) {
        x[u] = parts.first[place(first, u) * a.rows.sums];
        y[u] = second[place(first, u) * a.rows.sums];
      }
#pragma unroll
      for (int u = 0; u < kReduceUnroll; ++u)
        if (parts.more == 0) y[u] = 0;
    } else {
#pragma unroll
      for (int u = 0; u < kReduceUnroll; ++u) x[u] = a.partials[place(first, u) * a.channels + c];
    }
  }
  __device__ int place(int first, int u) const {
    const int i = first + u * a.blocks.deep;
    return i < depth ? i : depth - 1;
  }
  __device__ double loaded(int first) const {
    double s = 0;
#pragma unroll
    for (int u = 0; u < kReduceUnroll; ++u)
      if (first + u * a.blocks.deep < depth) s += Cut ? x[u] + y[u] : x[u];
    return s;
  }
  // With the first of them loaded.
  __device__ double sum() {
    const int step = kReduceUnroll * a.blocks.deep;
    double s = loaded(lane);
    for (int first = lane + step; first < depth; first += step) {
      load(first);
      s += loaded(first);
    }
    if (Cut && a.inner > a.rows.tile) {  // a run may reach across more than two tiles
      for (int i = lane; i < depth; i += a.blocks.deep) {
        const Parts parts = Parts::number(a, c, i);
        for (int p = 2; p <= parts.more; ++p) s += parts.first[p];
      }
    }
    return s;
  }
};

template <bool Cut>
__global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ Args a) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  const FinishBlocks& blocks = a.blocks;
  const int lane = static_cast<int>(threadIdx.x) >> blocks.across_bits;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blocks.across + (threadIdx.x & (blocks.across - 1));
  const bool owner = lane == 0 && c < a.channels;
  const int64_t channel = c < a.channels ? c : 0;  // threads without a channel take part in the sums, with nothing
  const Raw alpha(a.alpha, a.alpha_dtype, channel);
  const double m = count_of(a), k = factor_of(a);
  Share<Cut> share(a, channel, lane);
  Channel ch{};
  if (a.overlap) {
    if (owner) ch = channel_of(alpha.value(), a.eps);
    wait_for_previous();
  }
  share.load(lane);
  if (!a.overlap && owner) ch = channel_of(alpha.value(), a.eps);
  double s = share.sum();
  if (c >= a.channels) s = 0;
  if (blocks.deep > 1) s = strided_sum(scratch, s, blocks.across);
  double loss = 0;
  if (owner) {
    if (a.sum_sq != nullptr) a.sum_sq[c] = s;
    if (a.grad_alpha != nullptr) a.grad_alpha[c] = k * channel_grad_alpha(ch, s, m);
    loss = channel_loss(ch, s, m);
  }
  loss = block_sum(scratch, loss);
  if (blocks.blocks > 1) {
    if (threadIdx.x == 0) a.losses[blockIdx.x] = loss;
    if (!last_to_arrive(a.counter, static_cast<unsigned>(blocks.blocks))) return;
    loss = 0;
    for (int64_t i = threadIdx.x; i < blocks.blocks; i += kThreads) loss += __ldcg(a.losses + i);
    loss = block_sum(scratch, loss);
  }
  if (threadIdx.x == 0)
    store_as(a.loss, a.loss_dtype, 0, total_loss(loss, k, m * static_cast<double>(a.channels), a.full));
}

}  // namespace

void launch_finish(const Args& a, cudaStream_t stream) {
  const bool cut = a.rows.count > 0 && !a.rows.whole;
  launch("finish", cut ? &finish<true> : &finish<false>, a.blocks.blocks, kThreads * sizeof(double), stream, a,
         a.overlap);
}

}  // namespace vidfast::cuda
