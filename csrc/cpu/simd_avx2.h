// AVX2 + FMA + F16C.
#pragma once

#include "half_avx2.h"
#include "weight_blocks.h"

namespace vidfast::cpu {
namespace {

// What four vectors of numbers are, as weights.
inline Content content_of_numbers(const void* p) {
  const __m256i* v = static_cast<const __m256i*>(p);
  const __m256i any = _mm256_or_si256(_mm256_or_si256(_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)),
                                      _mm256_or_si256(_mm256_loadu_si256(v + 2), _mm256_loadu_si256(v + 3)));
  return _mm256_testz_si256(any, any) ? Content::kNothing : Content::kNumbers;
}

struct VF {
  using Scalar = float;
  using reg = __m256;
  static constexpr int W = 8;
  struct wide {
    __m256d lo, hi;
  };

  static float get(const float* p) { return *p; }
  static float get(const bf16* p) { return to_float(*p); }
  static float get(const f16* p) { return _cvtsh_ss(p->bits); }
  static float get(const uint8_t* p) { return *p; }
  static void put(float* p, float x) { *p = x; }
  static void put(bf16* p, float x) { *p = to_bf16(x); }
  static void put(f16* p, float x) { p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static reg load(const bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static reg load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static reg load(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static __m128i narrow(bf16*, reg a) { return narrow_bf16(a); }
  static __m128i narrow(f16*, reg a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
  static reg rounded(const bf16*, reg a) { return widen_bf16(narrow_bf16(a)); }
  static reg rounded(const f16*, reg a) { return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
  static void store(float* p, reg a) { _mm256_storeu_ps(p, a); }
  static void stream(float* p, reg a) { _mm256_stream_ps(p, a); }
  template <class Half>
  static void store(Half* p, reg a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p, a));
  }
  template <class Half>
  static void stream(Half* p, reg a) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(p, a));
  }
  static void fence() { _mm_sfence(); }

  static reg set1(float x) { return _mm256_set1_ps(x); }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg neg(reg a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
  static reg multiply_add(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static reg div(reg a, reg b) { return _mm256_div_ps(a, b); }
  static reg absolute(reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  // b where one of them is NaN
  static reg largest(reg a, reg b) { return _mm256_max_ps(a, b); }
  static reg smallest(reg a, reg b) { return _mm256_min_ps(a, b); }
  // x where a < b, else y
  static reg where_less(reg a, reg b, reg x, reg y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static reg nearest(reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^n for whole n from -300 to 300, by two factors that are normal numbers
  static reg scale_by(reg x, reg n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return mul(mul(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
  }
  // x * 2^n for whole n, of which x and the result are normal numbers
  static reg add_to_exponent(reg x, reg n) {
    const __m256i shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), shifted));
  }
  static reg power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  // The exponent k of a positive normal x = 2^k fraction, with fraction from sqrt(1/2) to sqrt(2).
  static reg split(reg x, reg* fraction) {
    const __m256i root = _mm256_set1_epi32(0x3f3504f3);
    const __m256i above = _mm256_sub_epi32(_mm256_castps_si256(x), root);
    const __m256i bits = _mm256_add_epi32(_mm256_and_si256(above, _mm256_set1_epi32(0x7fffff)), root);
    *fraction = _mm256_castsi256_ps(bits);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(above, 23));
  }
  static reg positive(reg a) { return _mm256_max_ps(_mm256_setzero_ps(), a); }  // NaN stays NaN
  static reg where_not_zero(reg a, reg x) {
    return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ), a);
  }
  // a where the byte is not 0
  static reg where_byte(reg a, const uint8_t* p) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_sign_epi32(_mm256_castps_si256(a), bytes));  // a, or 0 where the other is 0
  }
  // What four vectors of weights are.
  static Content content_of(const uint8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if (_mm256_testz_si256(bytes, bytes)) return Content::kNothing;
    return _mm256_testz_si256(bytes, _mm256_set1_epi8(~1)) ? Content::kFlags : Content::kNumbers;
  }
  static Content content_of(const float* p) { return content_of_numbers(p); }
  static wide wide_zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static wide wide_add(const wide& w, reg a) {
    return {_mm256_add_pd(w.lo, _mm256_cvtps_pd(_mm256_castps256_ps128(a))),
            _mm256_add_pd(w.hi, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)))};
  }
  static double wide_sum(const wide& w) {
    alignas(32) double v[4];
    _mm256_store_pd(v, _mm256_add_pd(w.lo, w.hi));
    return (v[0] + v[1]) + (v[2] + v[3]);
  }
};

struct VD {
  using Scalar = double;
  using reg = __m256d;
  static constexpr int W = 4;
  struct wide {
    __m256d v;
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

  static __m128i load4(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
  static reg load(const double* p) { return _mm256_loadu_pd(p); }
  static reg load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  static reg load(const bf16* p) { return _mm256_cvtps_pd(_mm256_castps256_ps128(widen_bf16(load4(p)))); }
  static reg load(const f16* p) { return _mm256_cvtps_pd(_mm_cvtph_ps(load4(p))); }
  static __m128i load_bytes(const uint8_t* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return _mm_cvtsi32_si128(bytes);
  }
  static reg load(const uint8_t* p) { return _mm256_cvtepi32_pd(_mm_cvtepu8_epi32(load_bytes(p))); }
  static void store(double* p, reg a) { _mm256_storeu_pd(p, a); }
  static void store(float* p, reg a) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a)); }
  static void store(bf16* p, reg a) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow_bf16(_mm256_castps128_ps256(_mm256_cvtpd_ps(a))));
  }
  static void store(f16* p, reg a) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(_mm256_cvtpd_ps(a), _MM_FROUND_TO_NEAREST_INT));
  }
  static void stream(double* p, reg a) { _mm256_stream_pd(p, a); }
  static void stream(float* p, reg a) { _mm_stream_ps(p, _mm256_cvtpd_ps(a)); }
  template <class Half>
  static void stream(Half* p, reg a) {
    store(p, a);
  }
  static void fence() { _mm_sfence(); }

  static reg set1(double x) { return _mm256_set1_pd(x); }
  static reg add(reg a, reg b) { return _mm256_add_pd(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_pd(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_pd(a, b); }
  static reg neg(reg a) { return _mm256_xor_pd(a, _mm256_set1_pd(-0.0)); }
  static reg multiply_add(reg a, reg b, reg c) { return _mm256_fmadd_pd(a, b, c); }
  static reg div(reg a, reg b) { return _mm256_div_pd(a, b); }
  static reg absolute(reg a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }
  // b where one of them is NaN
  static reg largest(reg a, reg b) { return _mm256_max_pd(a, b); }
  static reg smallest(reg a, reg b) { return _mm256_min_pd(a, b); }
  // x where a < b, else y
  static reg where_less(reg a, reg b, reg x, reg y) { return _mm256_blendv_pd(y, x, _mm256_cmp_pd(a, b, _CMP_LT_OQ)); }
  static reg nearest(reg a) { return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^n for whole n from -2100 to 2100, by two factors that are normal numbers
  static reg scale_by(reg x, reg n) {
    const reg half = nearest(mul(n, set1(0.5)));
    return mul(mul(x, power_of_two(half)), power_of_two(sub(n, half)));
  }
  // x * 2^n for whole n, of which x and the result are normal numbers
  static reg add_to_exponent(reg x, reg n) {
    const __m256i bits = _mm256_castpd_si256(add(n, set1(0x1.8p52)));
    return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(x), _mm256_slli_epi64(bits, 52)));
  }
  static reg power_of_two(reg n) {  // in whose sum with 1.5 * 2^52 the last bits are n
    const __m256i bits = _mm256_castpd_si256(add(n, set1(0x1.8p52 + 1023)));
    return _mm256_castsi256_pd(_mm256_slli_epi64(bits, 52));
  }
  // The exponent k of a positive normal x = 2^k fraction, with fraction from sqrt(1/2) to sqrt(2).
  static reg split(reg x, reg* fraction) {
    const __m256i root = _mm256_set1_epi64x(0x3fe6a09e00000000), two52 = _mm256_set1_epi64x(0x4330000000000000);
    const __m256i shifted =
        _mm256_add_epi64(_mm256_castpd_si256(x), _mm256_set1_epi64x(0x3ff0000000000000 - 0x3fe6a09e00000000));
    const __m256i bits = _mm256_add_epi64(_mm256_and_si256(shifted, _mm256_set1_epi64x(0xfffffffffffff)), root);
    *fraction = _mm256_castsi256_pd(bits);
    return sub(_mm256_castsi256_pd(_mm256_or_si256(_mm256_srli_epi64(shifted, 52), two52)), set1(0x1p52 + 1023));
  }
  static reg where_not_zero(reg a, reg x) {
    return _mm256_and_pd(_mm256_cmp_pd(x, _mm256_setzero_pd(), _CMP_NEQ_UQ), a);
  }
  // a where the byte is not 0
  static reg where_byte(reg a, const uint8_t* p) {
    const __m256i bytes = _mm256_cvtepu8_epi64(load_bytes(p));
    return _mm256_and_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(bytes, _mm256_setzero_si256())), a);
  }
  static Content content_of(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if (_mm_testz_si128(bytes, bytes)) return Content::kNothing;
    return _mm_testz_si128(bytes, _mm_set1_epi8(~1)) ? Content::kFlags : Content::kNumbers;
  }
  static Content content_of(const double* p) { return content_of_numbers(p); }
  static wide wide_zero() { return {_mm256_setzero_pd()}; }
  static wide wide_add(const wide& w, reg a) { return {_mm256_add_pd(w.v, a)}; }
  static double wide_sum(const wide& w) {
    alignas(32) double v[4];
    _mm256_store_pd(v, w.v);
    return (v[0] + v[1]) + (v[2] + v[3]);
  }
};

}  // namespace
}  // namespace vidfast::cpu
