#include "simd_avx2.h"
namespace vidfast::cpu {
namespace {
constexpr int kTogether = 6;  // vectors that are computed together, as measured (docs/kernel-notes.md)
}
}  // namespace vidfast::cpu
// simd and kTogether first: the kernels are written over them
#include "heteroscedastic_impl.h"

namespace vidfast::cpu {
const HeteroscedasticKernels& avx2_heteroscedastic() {
  static constexpr HeteroscedasticKernels kernels = heteroscedastic_kernels();
  return kernels;
}
}  // namespace vidfast::cpu
