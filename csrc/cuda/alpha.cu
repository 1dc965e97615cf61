// d/d alpha alone, from forward's sums: C numbers.
#include "reduce.h"

namespace vidfast::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) alpha_only(const __grid_constant__ Args a) {
  const double gk = incoming<false>(a);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < a.channels; c += stride)
    once_per_channel<false>(a, c, gk);
}

}  // namespace

void launch_alpha(const Args& a, cudaStream_t stream) {
  static Residency residency;
  launch_chunks("alpha", &alpha_only, residency, (a.channels + kThreads - 1) / kThreads, 0, stream, a);
}

}  // namespace vidfast::cuda
