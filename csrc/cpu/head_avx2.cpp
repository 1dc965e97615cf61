#include "simd_avx2.h"
namespace vidfast::cpu {
namespace {
constexpr int kGroup = 4;  // rows of a product: their sums, the columns and one row fill the 16 registers
}
}  // namespace vidfast::cpu
// simd and kGroup first: the tasks are written over them
#include "head_impl.h"

namespace vidfast::cpu {
const HeadKernels* avx2_head_kernels(DType module) { return with_words32(module, "avx2"); }
}  // namespace vidfast::cpu
