// Eight 16-bit values to and from fp32 with AVX2 and F16C, which AVX-512 has too.
#pragma once

#include <immintrin.h>

#include "half.h"

namespace vidfast::cpu {
namespace {

inline __m256 widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }

// A constant that compilers do not see into: short of registers they would make it anew at every use, by several
// instructions, where this one is read from memory.
inline __m256i constant(int32_t x) {
  __m256i v = _mm256_set1_epi32(x);
  __asm__("" : "+x"(v));
  return v;
}

inline __m128i narrow_bf16(__m256 f) {  // round to nearest even; NaN stays NaN
  const __m256i u = _mm256_castps_si256(f);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), constant(1));
  const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, constant(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, constant(0x400000));
  const __m256 nan = _mm256_cmp_ps(f, f, _CMP_UNORD_Q);
  const __m256i h = _mm256_srli_epi32(
      _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), nan)), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline __m256 load8(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline void store8(float* p, __m256 a) { _mm256_storeu_ps(p, a); }
inline void store8(bf16* p, __m256 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a)); }
inline void store8(f16* p, __m256 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace vidfast::cpu
