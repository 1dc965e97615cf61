// The kernel of `scale`: a one-pass gradient times the incoming gradient g, read on the device.
//
// Where g is exactly 1 and the gradient is scaled in place, blocks read g and return: one launch, no traffic. d/d
// alpha is always written. A warp walks a chunk of a row, with a head and a tail of single elements. Traffic
// otherwise: the gradient once in, once out.
#include <algorithm>

#include "scale.h"

namespace vidfast::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 4) scale_rows(const __grid_constant__ ScaleArgs a) {
  using Acc = std::conditional_t<is_double<T>, double, float>;
  constexpr int W = 16 / sizeof(T);
  constexpr int U = 4;
  const double g = load_as<double>(a.g, a.g_dtype, 0);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (a.grad_alpha != nullptr)
    for (int64_t c = thread; c < a.channels; c += static_cast<int64_t>(gridDim.x) * kThreads)
      store_as(a.grad_alpha_out, a.alpha_dtype, c, a.grad_alpha[c] * g);
  if (a.source.data == nullptr || (g == 1.0 && a.source.data == a.result.data)) return;

  const Acc factor = static_cast<Acc>(g);
  const int lane = threadIdx.x % kWarp;
  for (int64_t chunk = thread / kWarp; chunk < a.outer * a.pieces; chunk += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t o = quotient(chunk, a.by_pieces);
    const int64_t begin = (chunk - o * a.pieces) * a.piece;
    const int64_t n = begin + a.piece < a.row ? a.piece : a.row - begin;
    // Not restrict: the two may be one.
    const T* from = reinterpret_cast<const T*>(a.source.at<T>(o * a.source.stride + begin));
    T* to = reinterpret_cast<T*>(a.result.at<T>(o * a.result.stride + begin));
    const auto one = [&](int64_t i) { to[i] = narrow<T>(widen<Acc>(from[i]) * factor); };

    const int64_t head = head_elements<T>(to, n);
    if (!aligned<T>(from + head) || !aligned<T>(to + head)) {
      for (int64_t i = lane; i < n; i += kWarp) one(i);
      continue;
    }
    const int64_t count = (n - head) / W;
    const int64_t tail = n - head - count * W;
    for_edge_element(lane, head, tail, n, one);
    for (int64_t first = lane; first < count; first += kWarp * U) {
      Vector<T, W> v[U];
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (first + kWarp * u < count) v[u].load(from + head + (first + kWarp * u) * W, DType::f32);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (first + kWarp * u >= count) continue;
        Acc x[W];
        v[u].unpack(x);
        store_vector<T>(to + head + (first + kWarp * u) * W, DType::f32, x, factor);
      }
    }
  }
}

template <class T>
void launch_dtype(const ScaleArgs& a, cudaStream_t stream) {
  static Residency residency;
  const int64_t chunks = a.source.data == nullptr ? 0 : a.outer * a.pieces;
  const int64_t blocks = std::max<int64_t>((chunks + kWarps - 1) / kWarps, (a.channels + kThreads - 1) / kThreads);
  // One load of the device, not several: most calls only find that g is 1.
  launch("scale", &scale_rows<T>, std::min(std::max<int64_t>(blocks, 1), residency.blocks(&scale_rows<T>)), 0, stream,
         a);
}

}  // namespace

void launch_scale(const ScaleArgs& a, cudaStream_t stream) {
  switch (a.source.dtype) {
    case DType::f32: return launch_dtype<float>(a, stream);
    case DType::f64: return launch_dtype<double>(a, stream);
    case DType::bf16: return launch_dtype<bf16>(a, stream);
    case DType::f16: return launch_dtype<f16>(a, stream);
  }
}

}  // namespace vidfast::cuda
