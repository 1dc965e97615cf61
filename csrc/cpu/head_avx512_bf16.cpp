#include "simd_avx512.h"
namespace vidfast::cpu {
namespace {
constexpr int kGroup = 8;
}
}  // namespace vidfast::cpu
// simd and kGroup first: the tasks are written over them
#include "head_impl.h"

namespace vidfast::cpu {
namespace {

// A word is two bf16 values, whose products are added in fp32.
struct PairsOfBf16 {
  static constexpr int kValues = 2;
  static constexpr bool kRounds = true;
  static Reg multiply_add(Reg a, Reg b, Reg c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static Reg rounded(Reg a) { return widen_bf16(narrow_bf16(a)); }
  static Reg load(const float* x) { return VF::load(reinterpret_cast<const bf16*>(x)); }
  static Reg where_not_zero(Reg a, const float* x) { return VF::where_not_zero(a, load(x)); }
  static float word(float a, float b) {
    return float_of_bits(static_cast<uint32_t>(to_bf16(a).bits) | static_cast<uint32_t>(to_bf16(b).bits) << 16);
  }
  static void clear(float* rows, float* pairs, int64_t row, int64_t column) {
    constexpr bf16 zero{0};
    std::memcpy(reinterpret_cast<char*>(rows) + 2 * column, &zero, 2);
    std::memcpy(reinterpret_cast<char*>(pairs) + 4 * column + 2 * (row % 2), &zero, 2);
  }
  static void put(float* rows, int64_t row, float* pairs, Reg first, Reg second) {
    const __m256i a = narrow_bf16(first), b = narrow_bf16(second);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows), a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + row), b);
    _mm512_storeu_si512(pairs,
                        _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)));
  }
};

}  // namespace

const HeadKernels* avx512_bf16_head_kernels(DType module) {
  static const HeadKernels kernels = HeadTasks<PairsOfBf16>::table("avx512_bf16");
  return module == DType::bf16 ? &kernels : avx512_head_kernels(module);
}
}  // namespace vidfast::cpu
