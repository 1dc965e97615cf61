#include "simd_baseline.h"
// simd first: it defines the vectors that the kernels are written over
#include "heteroscedastic_kernels.h"
#include "kernels_impl.h"

namespace vidfast::cpu {
namespace {
const HeadKernels* no_head_kernels(DType) { return nullptr; }
}  // namespace
const InstructionSet& baseline_kernels() {
  static constexpr InstructionSet set = instruction_set("baseline", no_head_kernels, baseline_heteroscedastic);
  return set;
}
}  // namespace vidfast::cpu
