// AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include "half.h"
#include "weight_blocks.h"

namespace vidfast::cpu {
namespace {

inline __m512 widen_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }

inline __m256i narrow_bf16(__m512 f) {  // round to nearest even; NaN stays NaN
  const __m512i u = _mm512_castps_si512(f);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16));
}

// What four vectors of numbers are, as weights.
inline Content content_of_numbers(const void* p) {
  const __m512i* v = static_cast<const __m512i*>(p);
  const __m512i any = _mm512_or_si512(_mm512_or_si512(_mm512_loadu_si512(v), _mm512_loadu_si512(v + 1)),
                                      _mm512_or_si512(_mm512_loadu_si512(v + 2), _mm512_loadu_si512(v + 3)));
  return _mm512_test_epi64_mask(any, any) == 0 ? Content::kNothing : Content::kNumbers;
}

struct VF {
  using Scalar = float;
  using reg = __m512;
  static constexpr int W = 16;
  struct wide {
    __m512d lo, hi;
  };

  static float get(const float* p) { return *p; }
  static float get(const bf16* p) { return to_float(*p); }
  static float get(const f16* p) { return _cvtsh_ss(p->bits); }
  static float get(const uint8_t* p) { return *p; }
  static void put(float* p, float x) { *p = x; }
  static void put(bf16* p, float x) { *p = to_bf16(x); }
  static void put(f16* p, float x) { p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static reg load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static reg load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static reg load(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static __m256i narrow(bf16*, reg a) { return narrow_bf16(a); }
  static __m256i narrow(f16*, reg a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
  static reg rounded(const bf16*, reg a) { return widen_bf16(narrow_bf16(a)); }
  static reg rounded(const f16*, reg a) { return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
  static void store(float* p, reg a) { _mm512_storeu_ps(p, a); }
  static void stream(float* p, reg a) { _mm512_stream_ps(p, a); }
  template <class Half>
  static void store(Half* p, reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, a));
  }
  template <class Half>
  static void stream(Half* p, reg a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p, a));
  }
  static void fence() { _mm_sfence(); }

  static reg set1(float x) { return _mm512_set1_ps(x); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg neg(reg a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
  static reg multiply_add(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static reg div(reg a, reg b) { return _mm512_div_ps(a, b); }
  static reg absolute(reg a) { return _mm512_abs_ps(a); }
  // b where one of them is NaN
  static reg largest(reg a, reg b) { return _mm512_max_ps(a, b); }
  static reg smallest(reg a, reg b) { return _mm512_min_ps(a, b); }
  // x where a < b, else y
  static reg where_less(reg a, reg b, reg x, reg y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
  }
  static reg nearest(reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static reg scale_by(reg x, reg n) { return _mm512_scalef_ps(x, n); }  // x * 2^n for whole n
  static reg add_to_exponent(reg x, reg n) { return scale_by(x, n); }
  // The exponent k of a positive normal x = 2^k fraction, with fraction from sqrt(1/2) to sqrt(2).
  static reg split(reg x, reg* fraction) {
    // of the mantissa, which is at least 1, half where it is above sqrt(2)
    const reg mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const __mmask16 above = _mm512_cmp_ps_mask(mantissa, set1(0x1.6a09e6p0f), _CMP_GE_OQ);
    *fraction = _mm512_mask_mul_ps(mantissa, above, mantissa, set1(0.5f));
    const reg exponent = _mm512_getexp_ps(x);
    return _mm512_mask_add_ps(exponent, above, exponent, set1(1));
  }
  static reg positive(reg a) { return _mm512_max_ps(_mm512_setzero_ps(), a); }  // NaN stays NaN
  static reg where_not_zero(reg a, reg x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ), a);
  }
  // a where the byte is not 0
  static reg where_byte(reg a, const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_maskz_mov_ps(_mm_test_epi8_mask(bytes, bytes), a);
  }
  // What four vectors of weights are.
  static Content content_of(const uint8_t* p) {
    const __m512i bytes = _mm512_loadu_si512(p);
    if (_mm512_test_epi8_mask(bytes, bytes) == 0) return Content::kNothing;
    return _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(~1)) == 0 ? Content::kFlags : Content::kNumbers;
  }
  static Content content_of(const float* p) { return content_of_numbers(p); }
  static wide wide_zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static wide wide_add(const wide& w, reg a) {
    return {_mm512_add_pd(w.lo, _mm512_cvtps_pd(_mm512_castps512_ps256(a))),
            _mm512_add_pd(w.hi, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)))};
  }
  static double wide_sum(const wide& w) { return _mm512_reduce_add_pd(_mm512_add_pd(w.lo, w.hi)); }
};

struct VD {
  using Scalar = double;
  using reg = __m512d;
  static constexpr int W = 8;
  struct wide {
    __m512d v;
  };

  static double get(const double* p) { return *p; }
  static double get(const float* p) { return *p; }
  static double get(const bf16* p) { return to_float(*p); }
  static double get(const f16* p) { return _cvtsh_ss(p->bits); }
  static double get(const uint8_t* p) { return *p; }
  static void put(double* p, double x) { *p = x; }
  static void put(float* p, double x) { *p = static_cast<float>(x); }
  static void put(bf16* p, double x) { *p = to_bf16(static_cast<float>(x)); }
  static void put(f16* p, double x) { p->bits = _cvtss_sh(static_cast<float>(x), _MM_FROUND_TO_NEAREST_INT); }

  static __m128i load8(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static void store8(void* p, __m128i h) { _mm_storeu_si128(static_cast<__m128i*>(p), h); }
  static reg load(const double* p) { return _mm512_loadu_pd(p); }
  static reg load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  static reg load(const bf16* p) {
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load8(p)), 16)));
  }
  static reg load(const f16* p) { return _mm512_cvtps_pd(_mm256_cvtph_ps(load8(p))); }
  static reg load(const uint8_t* p) {
    return _mm512_cvtepi32_pd(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(double* p, reg a) { _mm512_storeu_pd(p, a); }
  static void store(float* p, reg a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a)); }
  static void store(bf16* p, reg a) {
    store8(p, _mm256_castsi256_si128(narrow_bf16(_mm512_castps256_ps512(_mm512_cvtpd_ps(a)))));
  }
  static void store(f16* p, reg a) { store8(p, _mm256_cvtps_ph(_mm512_cvtpd_ps(a), _MM_FROUND_TO_NEAREST_INT)); }
  static void stream(double* p, reg a) { _mm512_stream_pd(p, a); }
  static void stream(float* p, reg a) { _mm256_stream_ps(p, _mm512_cvtpd_ps(a)); }
  template <class Half>
  static void stream(Half* p, reg a) {
    store(p, a);
  }
  static void fence() { _mm_sfence(); }

  static reg set1(double x) { return _mm512_set1_pd(x); }
  static reg add(reg a, reg b) { return _mm512_add_pd(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_pd(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_pd(a, b); }
  static reg neg(reg a) { return _mm512_xor_pd(a, _mm512_set1_pd(-0.0)); }
  static reg multiply_add(reg a, reg b, reg c) { return _mm512_fmadd_pd(a, b, c); }
  static reg div(reg a, reg b) { return _mm512_div_pd(a, b); }
  static reg absolute(reg a) { return _mm512_abs_pd(a); }
  // b where one of them is NaN
  static reg largest(reg a, reg b) { return _mm512_max_pd(a, b); }
  static reg smallest(reg a, reg b) { return _mm512_min_pd(a, b); }
  // x where a < b, else y
  static reg where_less(reg a, reg b, reg x, reg y) {
    return _mm512_mask_mov_pd(y, _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ), x);
  }
  static reg nearest(reg a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static reg scale_by(reg x, reg n) { return _mm512_scalef_pd(x, n); }  // x * 2^n for whole n
  static reg add_to_exponent(reg x, reg n) { return scale_by(x, n); }
  // The exponent k of a positive normal x = 2^k fraction, with fraction from sqrt(1/2) to sqrt(2).
  static reg split(reg x, reg* fraction) {
    // of the mantissa, which is at least 1, half where it is above sqrt(2)
    const reg mantissa = _mm512_getmant_pd(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const __mmask8 above = _mm512_cmp_pd_mask(mantissa, set1(0x1.6a09e667f3bcdp0), _CMP_GE_OQ);
    *fraction = _mm512_mask_mul_pd(mantissa, above, mantissa, set1(0.5));
    const reg exponent = _mm512_getexp_pd(x);
    return _mm512_mask_add_pd(exponent, above, exponent, set1(1));
  }
  static reg where_not_zero(reg a, reg x) {
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x, _mm512_setzero_pd(), _CMP_NEQ_UQ), a);
  }
  // a where the byte is not 0
  static reg where_byte(reg a, const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm512_maskz_mov_pd(static_cast<__mmask8>(_mm_test_epi8_mask(bytes, bytes)), a);
  }
  static Content content_of(const uint8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if (_mm256_test_epi8_mask(bytes, bytes) == 0) return Content::kNothing;
    return _mm256_test_epi8_mask(bytes, _mm256_set1_epi8(~1)) == 0 ? Content::kFlags : Content::kNumbers;
  }
  static Content content_of(const double* p) { return content_of_numbers(p); }
  static wide wide_zero() { return {_mm512_setzero_pd()}; }
  static wide wide_add(const wide& w, reg a) { return {_mm512_add_pd(w.v, a)}; }
  static double wide_sum(const wide& w) { return _mm512_reduce_add_pd(w.v); }
};

}  // namespace
}  // namespace vidfast::cpu
