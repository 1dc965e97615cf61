#include "simd_avx2.h"
// simd first: it defines the vectors that the kernels are written over
#include "head_kernels.h"
#include "heteroscedastic_kernels.h"
#include "kernels_impl.h"

namespace vidfast::cpu {
const InstructionSet& avx2_kernels() {
  static constexpr InstructionSet set = instruction_set("avx2", avx2_head_kernels, avx2_heteroscedastic);
  return set;
}
}  // namespace vidfast::cpu
