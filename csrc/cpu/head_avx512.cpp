#include "simd_avx512.h"
namespace vidfast::cpu {
namespace {
constexpr int kGroup = 8;  // rows of a product: their sums, the columns and one row are in 28 of 32 registers
}
}  // namespace vidfast::cpu
// simd and kGroup first: the tasks are written over them
#include "head_impl.h"

namespace vidfast::cpu {
const HeadKernels* avx512_head_kernels(DType module) { return with_words32(module, "avx512"); }
}  // namespace vidfast::cpu
