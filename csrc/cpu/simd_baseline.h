// Vectors as plain arrays: the compiler turns them into whatever the build's target has (SSE2, NEON, ...).
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "weight_blocks.h"

#define VIDFAST_ARRAYS

namespace vidfast::cpu {
namespace {

template <class S, int Lanes>
struct Vector {
  using Scalar = S;
  static constexpr int W = Lanes;
  struct reg {
    S v[Lanes];
  };
  struct wide {
    double v[Lanes];
  };

  static S get(const float* p) { return static_cast<S>(*p); }
  static S get(const double* p) { return static_cast<S>(*p); }
  static S get(const bf16* p) { return static_cast<S>(to_float(*p)); }
  static S get(const f16* p) { return static_cast<S>(to_float(*p)); }
  static S get(const uint8_t* p) { return static_cast<S>(*p); }
  static void put(float* p, S x) { *p = static_cast<float>(x); }
  static void put(double* p, S x) { *p = static_cast<double>(x); }
  static void put(bf16* p, S x) { *p = to_bf16(static_cast<float>(x)); }
  static void put(f16* p, S x) { *p = to_f16(static_cast<float>(x)); }

  template <class T>
  static reg load(const T* p) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = get(p + i);
    return r;
  }
  template <class T>
  static void store(T* p, const reg& a) {
    for (int i = 0; i < W; ++i) put(p + i, a.v[i]);
  }
  template <class T>
  static void stream(T* p, const reg& a) {
    store(p, a);
  }
  static void fence() {}

  static reg set1(S x) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = x;
    return r;
  }
  static reg add(const reg& a, const reg& b) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = a.v[i] + b.v[i];
    return r;
  }
  static reg sub(const reg& a, const reg& b) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = a.v[i] - b.v[i];
    return r;
  }
  static reg mul(const reg& a, const reg& b) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = a.v[i] * b.v[i];
    return r;
  }
  static reg neg(const reg& a) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = -a.v[i];
    return r;
  }
  // a * b + c
  static reg multiply_add(const reg& a, const reg& b, const reg& c) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = a.v[i] * b.v[i] + c.v[i];
    return r;
  }
  static reg div(const reg& a, const reg& b) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = a.v[i] / b.v[i];
    return r;
  }
  static reg absolute(const reg& a) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = std::fabs(a.v[i]);
    return r;
  }
  // b where one of them is NaN
  static reg largest(const reg& a, const reg& b) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return r;
  }
  static reg smallest(const reg& a, const reg& b) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return r;
  }
  // x where a < b, else y
  static reg where_less(const reg& a, const reg& b, const reg& x, const reg& y) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i];
    return r;
  }
  // of numbers below 2^22 (2^51) in size: what is added rounds them
  static reg nearest(const reg& a) {
    constexpr S kShift = sizeof(S) == 4 ? S(0x1.8p23) : S(0x1.8p52);
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = (a.v[i] + kShift) - kShift;
    return r;
  }
  using Bits = std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>;
  static constexpr int kMantissa = sizeof(S) == 4 ? 23 : 52, kBias = sizeof(S) == 4 ? 127 : 1023;
  static Bits bits_of_number(S x) {
    Bits b;
    std::memcpy(&b, &x, sizeof(x));
    return b;
  }
  static S number_of_bits(Bits b) {
    S x;
    std::memcpy(&x, &b, sizeof(x));
    return x;
  }
  // x * 2^n for whole n, by two factors that are normal numbers
  static reg scale_by(const reg& x, const reg& n) {
    reg r;
    for (int i = 0; i < W; ++i) {
      const int whole = n.v[i] == n.v[i] ? static_cast<int>(n.v[i]) : 0, half = whole >> 1;
      r.v[i] = x.v[i] * number_of_bits(Bits(half + kBias) << kMantissa) *
               number_of_bits(Bits(whole - half + kBias) << kMantissa);
    }
    return r;
  }
  // x * 2^n for whole n, of which x and the result are normal numbers
  static reg add_to_exponent(const reg& x, const reg& n) {
    reg r;
    for (int i = 0; i < W; ++i) {
      const int whole = n.v[i] == n.v[i] ? static_cast<int>(n.v[i]) : 0;
      r.v[i] = number_of_bits(bits_of_number(x.v[i]) + (Bits(whole) << kMantissa));
    }
    return r;
  }
  // The exponent k of a positive normal x = 2^k fraction, with fraction from sqrt(1/2) to sqrt(2).
  static reg split(const reg& x, reg* fraction) {
    constexpr Bits kRoot = sizeof(S) == 4 ? Bits(0x3f3504f3) : Bits(0x3fe6a09e00000000);
    constexpr Bits kOne = Bits(kBias) << kMantissa;
    reg r;
    for (int i = 0; i < W; ++i) {
      const Bits shifted = bits_of_number(x.v[i]) + (kOne - kRoot);
      r.v[i] = static_cast<S>(static_cast<int>(shifted >> kMantissa) - kBias);
      fraction->v[i] = number_of_bits((shifted & ((Bits(1) << kMantissa) - 1)) + kRoot);
    }
    return r;
  }
  static reg where_not_zero(const reg& a, const reg& x) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = x.v[i] != 0 ? a.v[i] : S(0);
    return r;
  }
  // a where the byte is not 0
  static reg where_byte(const reg& a, const uint8_t* p) {
    reg r;
    for (int i = 0; i < W; ++i) r.v[i] = p[i] != 0 ? a.v[i] : S(0);
    return r;
  }
  // What four vectors of weights are.
  static Content content_of(const uint8_t* p) {
    constexpr uint64_t kOneInEach = 0x0101010101010101;
    const uint64_t bits = bits_of<4 * W>(p);
    return bits == 0 ? Content::kNothing : (bits & ~kOneInEach) == 0 ? Content::kFlags : Content::kNumbers;
  }
  static Content content_of(const S* p) {
    return bits_of<4 * W * sizeof(S)>(p) == 0 ? Content::kNothing : Content::kNumbers;
  }
  static wide wide_zero() {
    wide w;
    for (int i = 0; i < W; ++i) w.v[i] = 0;
    return w;
  }
  static wide wide_add(const wide& w, const reg& a) {
    wide r;
    for (int i = 0; i < W; ++i) r.v[i] = w.v[i] + static_cast<double>(a.v[i]);
    return r;
  }
  static double wide_sum(const wide& w) {
    double s = 0;
    for (int i = 0; i < W; ++i) s += w.v[i];
    return s;
  }
};

using VF = Vector<float, 8>;
using VD = Vector<double, 4>;

}  // namespace
}  // namespace vidfast::cpu
