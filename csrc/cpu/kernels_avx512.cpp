#include "simd_avx512.h"
// simd first: it defines the vectors that the kernels are written over
#include "kernels_impl.h"

namespace vidfast::cpu {
const InstructionSet& avx512_kernels() {
  static constexpr InstructionSet set = instruction_set("avx512");
  return set;
}
}  // namespace vidfast::cpu
