#include "simd_baseline.h"
// simd first: it defines the vectors that the kernels are written over
#include "kernels_impl.h"

namespace vidfast::cpu {
const InstructionSet& baseline_kernels() {
  static constexpr InstructionSet set = instruction_set("baseline");
  return set;
}
}  // namespace vidfast::cpu
