// Vectors as plain arrays: the compiler turns them into whatever the build's target has (SSE2, NEON, ...).
#pragma once

#include "half.h"
#include "weight_blocks.h"

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
