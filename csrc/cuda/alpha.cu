// d/d alpha alone, from forward's sums: C numbers.
#include "reduce.h"

namespace vidfast::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) alpha_only(const __grid_constant__ Args a) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c < a.channels) write_grad_alpha(a, c, Scale<false>(a, c).gk());
}

}  // namespace

void launch_alpha(const Args& a, cudaStream_t stream) {
  launch("alpha", &alpha_only, (a.channels + kThreads - 1) / kThreads, 0, stream, a);
}

}  // namespace vidfast::cuda
