#include "simd_baseline.h"
namespace vidfast::cpu {
namespace {
constexpr int kTogether = 1;  // vectors that are computed together: plain arrays are several registers already
}
}  // namespace vidfast::cpu
// simd and kTogether first: the kernels are written over them
#include "heteroscedastic_impl.h"

namespace vidfast::cpu {
const HeteroscedasticKernels& baseline_heteroscedastic() {
  static constexpr HeteroscedasticKernels kernels = heteroscedastic_kernels();
  return kernels;
}
}  // namespace vidfast::cpu
