#include "simd_avx512.h"
// simd first: it defines the vectors that the kernels are written over
#include "head_kernels.h"
#include "heteroscedastic_kernels.h"
#include "kernels_impl.h"

namespace vidfast::cpu {
const InstructionSet& avx512_kernels() {
  static constexpr InstructionSet set = instruction_set("avx512", avx512_head_kernels, avx512_heteroscedastic);
  return set;
}
#ifdef VIDFAST_AVX512_BF16
// The same, but for heads.
const InstructionSet& avx512_bf16_kernels() {
  static constexpr InstructionSet set =
      instruction_set("avx512_bf16", avx512_bf16_head_kernels, avx512_heteroscedastic);
  return set;
}
#endif
}  // namespace vidfast::cpu
