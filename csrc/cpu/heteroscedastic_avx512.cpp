#include "simd_avx512.h"
namespace vidfast::cpu {
namespace {
constexpr int kTogether = 4;  // vectors that are computed together: their steps fill the 32 registers
}
}  // namespace vidfast::cpu
// simd and kTogether first: the kernels are written over them
#include "heteroscedastic_impl.h"

namespace vidfast::cpu {
const HeteroscedasticKernels& avx512_heteroscedastic() {
  static constexpr HeteroscedasticKernels kernels = heteroscedastic_kernels();
  return kernels;
}
}  // namespace vidfast::cpu
