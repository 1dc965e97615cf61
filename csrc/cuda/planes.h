// The kernel of planes: from kPlane neighbouring elements of one channel on (or one channel in all).
//
// A warp walks a chunk: up to 1024 vectors of one channel, a head and a tail of single elements where planes do not
// begin or end on 16 bytes. Running sums are fp32 (fp64 for fp64), one for each element of a vector, of at most
// 64 values each; a lane's are added in fp64, then the warp's, and the chunk's sum is stored for the finish. Traffic:
// mean and target once, each gradient once.
//
// Masked: there is a weight for each position. Those of a batch of vectors are loaded first, and of a vector whose
// weights are all 0 nothing else is.
#pragma once

#include "reduce.h"
#include "weights.h"

namespace vidfast::cuda {
namespace {

// One run of n neighbouring elements, seen from one lane.
template <class M, class T, bool Sum, bool Masked>
struct Run {
  using P = Pair<M, T>;
  using Acc = typename P::Acc;
  static constexpr int W = P::width;
  static constexpr int U = P::batch;

  const Args& a;
  Acc scale;
  Acc (&sum)[W];
  unsigned char *mean, *target, *grad_mean, *grad_target;
  Weights<Acc, P::any> weights;  // Masked

  // From element `first` of the plane of channel c and outer index o on.
  __device__ void begin(int64_t o, int64_t c, int64_t first) {
    const int64_t offset = c * a.inner + first;
    mean = a.mean.at<M>(o * a.mean.stride + offset);
    target = a.target.at<T>(o * a.target.stride + offset);
    grad_mean = a.grad_mean.data == nullptr ? nullptr : a.grad_mean.at<M>(o * a.grad_mean.stride + offset);
    grad_target =
        Sum || a.grad_target.data == nullptr ? nullptr : a.grad_target.at<T>(o * a.grad_target.stride + offset);
    if constexpr (Masked) {
      weights = {a.positions, a.position_bytes};
      weights.base += (o * a.inner + first) * weights.size;
    }
  }
  // The same run of the next outer index.
  __device__ void next() {
    mean += a.mean.step_bytes;
    target += a.target.step_bytes;
    if (grad_mean != nullptr) grad_mean += a.grad_mean.step_bytes;
    if (!Sum && grad_target != nullptr) grad_target += a.grad_target.step_bytes;
    if constexpr (Masked) weights.base += a.inner * weights.size;
  }
  __device__ unsigned char* element(unsigned char* base, const Tensor& t, int i, int bytes) const {
    return base + i * (P::any ? t.bytes : bytes);
  }
  static constexpr int mean_bytes = is_any<M> ? 0 : sizeof(M);
  static constexpr int target_bytes = is_any<T> ? 0 : sizeof(T);

  __device__ void one(int i, Acc w, Acc& into) {
    Acc gradient = 0;
    if (!Masked || w != 0)
      gradient = gradient_of<Sum, Masked>(
          load_element<Acc, M>(element(mean, a.mean, i, mean_bytes), a.mean.dtype),
          load_element<Acc, T>(element(target, a.target, i, target_bytes), a.target.dtype), w, scale, into);
    if (grad_mean != nullptr) store_element<M>(element(grad_mean, a.mean, i, mean_bytes), a.mean.dtype, gradient);
    if (!Sum && grad_target != nullptr)
      store_element<T>(element(grad_target, a.target, i, target_bytes), a.target.dtype, -gradient);
  }

  // The first batch of n elements. Masked: each lane asks for its own vectors, where they count.
  __device__ void prefetch_start(int lane, int n) const {
    if constexpr (Masked) {
      const int head = head_elements<M>(mean, n);
      Acc w[U][W];
      load_weights(w, lane, (n - head) / W, head);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (!any(w[u])) continue;
        prefetch(element(mean, a.mean, head + (lane + kWarp * u) * W, mean_bytes));
        prefetch(element(target, a.target, head + (lane + kWarp * u) * W, target_bytes));
      }
    } else {
      prefetch_lines(lane, n);
    }
  }
  __device__ void prefetch_lines(int lane, int n) const {
    const auto line = [&](const unsigned char* from, int i, int bytes) {
      return 128 * i < n * bytes ? from + 128 * i : nullptr;
    };
    prefetch_batch<M, T>(
        lane, [&](int u, int i) { return line(mean, u * (kWarp * W * mean_bytes / 128) + i, mean_bytes); },
        [&](int u, int i) { return line(target, u * (kWarp * W * target_bytes / 128) + i, target_bytes); });
  }

  // Those of the vectors first, first + 32, ... of `count` behind the head; 0 beyond the end.
  __device__ void load_weights(Acc (&w)[U][W], int first, int count, int head) const {
    const auto vector = [&](int u) { return first + kWarp * u; };
    if (weights.template aligned_at<W>(head)) {
      weights.load_vectors(w, [&](int u) { return vector(u) < count ? head + vector(u) * W : -1; });
    } else {
      Acc flat[U * W];
      weights.load(flat, [&](int j) { return vector(j / W) < count ? head + vector(j / W) * W + j % W : -1; });
#pragma unroll
      for (int j = 0; j < U * W; ++j) w[j / W][j % W] = flat[j];
    }
  }

  __device__ void walk(int lane, int n) {
    const int head = head_elements<M>(mean, n);
    const bool vectors =
        aligned<M>(element(mean, a.mean, head, mean_bytes)) &&
        aligned<T>(element(target, a.target, head, target_bytes)) &&
        (grad_mean == nullptr || aligned<M>(element(grad_mean, a.mean, head, mean_bytes))) &&
        (Sum || grad_target == nullptr || aligned<T>(element(grad_target, a.target, head, target_bytes)));
    if (!vectors) {
      for (int i = lane; i < n; i += kWarp * W) {
        Acc w[W] = {};
        if constexpr (Masked) weights.load(w, [&](int e) { return i + kWarp * e < n ? i + kWarp * e : -1; });
#pragma unroll
        for (int e = 0; e < W; ++e)
          if (i + kWarp * e < n) one(i + kWarp * e, w[e], sum[e]);
      }
      return;
    }
    const int count = (n - head) / W;
    const int tail = n - head - count * W;
    for_edge_element(lane, head, tail, n, [&](int i) {
      Acc w[1] = {};
      if constexpr (Masked) weights.load(w, [&](int) { return i; });
      one(i, w[0], sum[0]);
    });
    for (int first = lane; first < count; first += kWarp * U) {
      Vector<M, W> m[U];
      Vector<T, W> t[U];
      Acc w[U][W] = {};
      if constexpr (Masked) load_weights(w, first, count, head);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int v = first + kWarp * u;
        if (Masked ? any(w[u]) : v < count) {
          m[u].load(element(mean, a.mean, head + v * W, mean_bytes), a.mean.dtype);
          t[u].load(element(target, a.target, head + v * W, target_bytes), a.target.dtype);
        }
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int v = first + kWarp * u;
        if (v >= count) continue;
        Acc x[W] = {}, y[W];
        if (!Masked || any(w[u])) {
          m[u].unpack(x);
          t[u].unpack(y);
#pragma unroll
          for (int e = 0; e < W; ++e) x[e] = gradient_of<Sum, Masked>(x[e], y[e], w[u][e], scale, sum[e]);
        }
        if (grad_mean != nullptr)
          store_vector<M>(element(grad_mean, a.mean, head + v * W, mean_bytes), a.mean.dtype, x, Acc(1));
        if (!Sum && grad_target != nullptr)
          store_vector<T>(element(grad_target, a.target, head + v * W, target_bytes), a.target.dtype, x, Acc(-1));
      }
    }
  }
};

template <class M, class T, bool Sum, bool Masked>
__global__ void __launch_bounds__(kThreads, (Pair<M, T>::any || Masked ? 2 : 3))
    planes(const __grid_constant__ Args a) {
  using Acc = typename Pair<M, T>::Acc;
  constexpr int W = Pair<M, T>::width;
  const int lane = threadIdx.x % kWarp;
  const PlaneChunks& cut = a.planes;
  begin_sweep<Sum>(a);
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (chunk >= cut.count) return;
  const int64_t plane = quotient(chunk, cut.by_pieces);
  const int64_t block = quotient(plane, cut.by_channels);
  const int64_t piece = chunk - plane * cut.pieces;
  const int64_t c = plane - block * a.channels;
  const int64_t begin = piece * cut.piece;
  const int n = static_cast<int>(begin + cut.piece < a.inner ? cut.piece : a.inner - begin);
  const int planes = static_cast<int>((block + 1) * cut.outer < a.outer ? cut.outer : a.outer - block * cut.outer);

  Acc sum[W] = {};
  Run<M, T, Sum, Masked> run{a, Acc(0), sum, nullptr, nullptr, nullptr, nullptr, {}};
  run.begin(block * cut.outer, c, begin);
  if (any_gradient<Sum>(a)) {
    if (a.prefetch) run.prefetch_start(lane, n);
    const Scale<Sum> scale(a, c);
    run.scale = static_cast<Acc>(scale.value());
    if (!Sum && piece == 0 && block == 0 && lane == 0) write_grad_alpha(a, c, scale.gk());
  }
  for (int left = planes; left > 0; --left) {
    run.walk(lane, n);
    run.next();
  }
  if constexpr (Sum) {
    double total = 0;
#pragma unroll
    for (int e = 0; e < W; ++e) total += static_cast<double>(sum[e]);
    total = warp_sum(total);
    if (lane == 0) a.partials[(block * cut.pieces + piece) * a.channels + c] = total;
  }
}

template <class M, class T, bool Sum, bool Masked>
void launch_pair(const Args& a, cudaStream_t stream) {
  const int64_t blocks = (a.planes.count + kWarps - 1) / kWarps;
  launch(Sum ? "planes (forward)" : "planes (backward)", &planes<M, T, Sum, Masked>, blocks, 0, stream, a);
}

template <bool Masked>
void launch_planes_of(const Args& a, bool sums, cudaStream_t stream) {
#define VIDFAST_LAUNCH(M, T)                              \
  if (is_of<M>(a.mean.dtype) && is_of<T>(a.target.dtype)) \
    return sums ? launch_pair<M, T, true, Masked>(a, stream) : launch_pair<M, T, false, Masked>(a, stream);
  VIDFAST_CUDA_PAIRS(VIDFAST_LAUNCH)
#undef VIDFAST_LAUNCH
}

}  // namespace
}  // namespace vidfast::cuda
