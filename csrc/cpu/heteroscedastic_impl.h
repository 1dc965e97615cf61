// The kernels with one variance an element, written once over the vector type of whichever simd_*.h was included before
// this file. Everything is in an unnamed namespace: each instruction set's translation unit keeps its own copy.
//
// Order of summation: some vectors of running sums, at most kRun values each in the compute type, then fp64.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "heteroscedastic_kernels.h"
#include "kernels.h"
#include "simd_several.h"
#include "vector_math.h"

namespace vidfast::cpu {
namespace {

// All that the loop calls becomes part of it, but over plain arrays.
#ifdef VIDFAST_ARRAYS
#define VIDFAST_ELEMENT_LOOP
#else
#define VIDFAST_ELEMENT_LOOP __attribute__((flatten))
#endif

enum class Pass { kSum, kSumGrad, kGrad };

// Of an element: log v, 1/v (of log_variance its root, twice a factor of r: 1/v itself overflows before r / v), its
// derivative (dv / d raw) / v, and v itself where 1/v may be no number.
template <class V>
struct Variance {
  typename V::reg log, inverse, slope, value;
};

// Whether variances are normal numbers, by their floor; 1/v is one too then.
template <class V>
inline bool has_normal_floor(const ElementConstants& c) {
  using S = typename V::Scalar;
  return static_cast<S>(c.eps) >= std::numeric_limits<S>::min();
}

template <class V, Transform transform>
inline Variance<V> variance_of(typename V::reg raw, const ElementConstants& c) {
  using S = typename V::Scalar;
  using reg = typename V::reg;
  const reg eps = V::set1(static_cast<S>(c.eps));
  const bool normal = has_normal_floor<V>(c);
  const auto log = [&](reg v) { return normal ? logarithm_of_normal<V>(v) : logarithm<V>(v); };
  const reg zero = V::set1(0), one = V::set1(1);
  if constexpr (transform == Transform::log_variance) {
    return {raw, exponential<V>(V::mul(V::set1(S(-0.5)), raw)), one, one};
  } else if constexpr (transform == Transform::clamp) {
    reg v = V::largest(eps, raw);  // NaN stays NaN
    if (c.negative_is_nan) v = V::where_less(raw, zero, V::set1(std::numeric_limits<S>::quiet_NaN()), v);
    const reg inverse = V::div(one, v);
    return {log(v), inverse, inverse, v};
  } else {
    const reg e = exponential_of_negative<V>(V::neg(V::absolute(raw)));  // from 0 to 1
    const reg above = V::largest(zero, raw);
    if constexpr (transform == Transform::softplus) {
      const reg v = V::add(V::add(above, log_one_plus<V>(e)), eps);
      const reg whole = V::add(one, e);
      const reg quotient = V::div(one, V::mul(whole, v));  // one division for 1/v and the sigmoid
      return {log(v), V::mul(quotient, whole), V::mul(quotient, V::where_less(raw, zero, e, one)), v};
    } else {
      // v = exp(raw) + eps, or where raw > 0 exp(raw) (1 + eps exp(-raw)), in which nothing overflows
      const reg rest = V::where_less(zero, raw, V::multiply_add(eps, e, one), V::add(e, eps));
      const reg quotient = V::div(one, rest), small = V::mul(quotient, e);
      const reg inverse = V::where_less(zero, raw, small, quotient);
      return {V::add(log(rest), above), inverse, V::where_less(zero, raw, quotient, small), inverse};
    }
  }
}

template <class V, class P, Transform transform, Pass pass>
struct Kernel {
  using S = typename V::Scalar;
  static constexpr int64_t W = V::W;
  static constexpr bool kSums = pass != Pass::kGrad, kGrads = pass != Pass::kSum;

  struct At {  // as in Elements
    const P *mean, *target, *raw;
    const S* weights;
    P *grad_mean, *grad_target, *grad_raw;
  };

  // A vector of elements, or several (X), and `sum` with what they add to it.
  template <class X>
  static inline typename X::reg vector(const At& at, int64_t i, const ElementConstants& c, typename X::reg sum,
                                       bool stream) {
    using reg = typename X::reg;
    const reg one = X::set1(1);
    const Variance<X> v = variance_of<X, transform>(X::load(at.raw + i), c);
    const reg r = X::sub(X::load(at.mean + i), X::load(at.target + i));
    constexpr bool kHasValue = transform == Transform::softplus || transform == Transform::clamp;
    const bool divides = kHasValue && !has_normal_floor<X>(c);
    const reg by_inverse = X::mul(r, v.inverse);
    const reg quotient = transform == Transform::log_variance ? X::mul(by_inverse, v.inverse)
                         : divides                            ? X::div(r, v.value)
                                                              : by_inverse;
    const reg ratio = X::mul(r, quotient);
    reg factor = one;
    if (c.beta != 0) factor = exponential<X>(X::mul(v.log, X::set1(static_cast<S>(c.beta))));
    reg weight = one;
    if (at.weights != nullptr) {
      weight = X::load(at.weights + i);
      factor = X::mul(factor, weight);
    }
    // Where a weight is 0 nothing comes of an element, NaN or not.
    const auto counted = [&](reg x) { return at.weights == nullptr ? x : X::where_not_zero(x, weight); };
    if (kGrads) {
      const reg scale = X::mul(factor, X::set1(static_cast<S>(c.scale)));
      const reg grad = counted(X::mul(scale, quotient));
      if (at.grad_mean != nullptr) put<X>(at.grad_mean + i, grad, stream);
      if (pass == Pass::kGrad && at.grad_target != nullptr) X::store(at.grad_target + i, X::sub(X::set1(0), grad));
      if (at.grad_raw != nullptr) {
        const reg slope = transform == Transform::log_variance ? scale : X::mul(scale, v.slope);
        const reg half = X::mul(X::set1(S(0.5)), X::sub(one, ratio));
        put<X>(at.grad_raw + i, counted(X::mul(half, slope)), stream);
      }
    }
    if (!kSums) return sum;
    const reg own = X::add(X::add(v.log, ratio), X::set1(static_cast<S>(c.constant)));
    if (c.beta == 0 && at.weights == nullptr) return X::add(sum, own);
    return X::add(sum, counted(X::mul(factor, own)));
  }

  template <class X>
  static inline void put(P* p, typename X::reg a, bool stream) {
    if (stream)
      X::stream(p, a);
    else
      X::store(p, a);
  }

  // The last elements, fewer than a vector: as one vector whose others weigh nothing.
  static inline typename V::reg rest(const At& at, int64_t i, int64_t n, const ElementConstants& c) {
    alignas(64) P mean[W] = {}, target[W] = {}, raw[W] = {}, grads[3][W];
    alignas(64) S weights[W] = {};
    std::memcpy(mean, at.mean + i, n * sizeof(P));
    std::memcpy(target, at.target + i, n * sizeof(P));
    std::memcpy(raw, at.raw + i, n * sizeof(P));
    for (int64_t j = 0; j < n; ++j) weights[j] = at.weights == nullptr ? S(1) : at.weights[i + j];
    At padded{mean, target, raw, weights, nullptr, nullptr, nullptr};
    if (at.grad_mean != nullptr) padded.grad_mean = grads[0];
    if (at.grad_target != nullptr) padded.grad_target = grads[1];
    if (at.grad_raw != nullptr) padded.grad_raw = grads[2];
    const typename V::reg sum = vector<V>(padded, 0, c, V::set1(0), false);
    if (at.grad_mean != nullptr) std::memcpy(at.grad_mean + i, grads[0], n * sizeof(P));
    if (at.grad_target != nullptr) std::memcpy(at.grad_target + i, grads[1], n * sizeof(P));
    if (at.grad_raw != nullptr) std::memcpy(at.grad_raw + i, grads[2], n * sizeof(P));
    return sum;
  }

  VIDFAST_ELEMENT_LOOP static double run(const Elements& job, const ElementConstants& c, bool stream) {
    using X = Several<V, kTogether>;
    const At at{static_cast<const P*>(job.mean),    static_cast<const P*>(job.target), static_cast<const P*>(job.raw),
                static_cast<const S*>(job.weights), static_cast<P*>(job.grad_mean),    static_cast<P*>(job.grad_target),
                static_cast<P*>(job.grad_raw)};
    typename V::wide total = V::wide_zero();
    int64_t i = 0;
    while (job.n - i >= X::W) {
      const int64_t most = i + kRun * X::W;
      const int64_t stop = job.n < most ? job.n : most;
      typename X::reg sum = X::set1(0);
      for (; stop - i >= X::W; i += X::W) sum = vector<X>(at, i, c, sum, stream);
      if (kSums) total = X::wide_add(total, sum);
    }
    typename V::reg sum = V::set1(0);
    for (; job.n - i >= W; i += W) sum = vector<V>(at, i, c, sum, stream);
    if (kSums) total = V::wide_add(total, sum);
    if (i < job.n) {
      sum = rest(at, i, job.n - i, c);
      if (kSums) total = V::wide_add(total, sum);
    }
    if (kGrads && stream) V::fence();
    return kSums ? V::wide_sum(total) : 0;
  }
};

template <class P, Transform transform>
constexpr ElementPasses passes_of() {
  using V = std::conditional_t<std::is_same_v<P, double>, VD, VF>;
  return {Kernel<V, P, transform, Pass::kSum>::run, Kernel<V, P, transform, Pass::kSumGrad>::run,
          Kernel<V, P, transform, Pass::kGrad>::run};
}

// n elements of rows, from the j'th of the row at `from` on, into neighbours.
template <class V, class P>
void gather(const void* from, const RowWalk& walk, void* to) {
  const P* p = static_cast<const P*>(from);
  typename V::Scalar* s = static_cast<typename V::Scalar*>(to);
  int64_t j = walk.first;
  for (int64_t n = walk.count; n > 0; p += walk.stride, j = 0) {
    const int64_t stop = walk.row - j < n ? walk.row : j + n;
    n -= stop - j;
    for (; stop - j >= V::W; j += V::W, s += V::W) V::store(s, V::load(p + j));
    for (; j < stop; ++j) *s++ = V::get(p + j);
  }
}

// And back.
template <class V, class P>
void scatter(const void* from, const RowWalk& walk, void* to) {
  const typename V::Scalar* s = static_cast<const typename V::Scalar*>(from);
  P* p = static_cast<P*>(to);
  int64_t j = walk.first;
  for (int64_t n = walk.count; n > 0; p += walk.stride, j = 0) {
    const int64_t stop = walk.row - j < n ? walk.row : j + n;
    n -= stop - j;
    for (; stop - j >= V::W; j += V::W, s += V::W) V::store(p + j, V::load(s));
    for (; j < stop; ++j) V::put(p + j, *s++);
  }
}

template <class V, typename V::reg (*function)(typename V::reg)>
void apply(const void* from, void* to, int64_t n) {
  using S = typename V::Scalar;
  alignas(64) S x[V::W] = {};
  for (int64_t i = 0; i < n; i += V::W) {
    const int64_t count = n - i < V::W ? n - i : V::W;
    std::memcpy(x, static_cast<const S*>(from) + i, count * sizeof(S));
    V::store(x, function(V::load(x)));
    std::memcpy(static_cast<S*>(to) + i, x, count * sizeof(S));
  }
}

template <class V>
constexpr Functions functions_of() {
  return {{apply<V, exponential<V>>, apply<V, exponential_of_negative<V>>, apply<V, logarithm<V>>,
           apply<V, logarithm_of_normal<V>>, apply<V, log_one_plus<V>>}};
}

constexpr HeteroscedasticKernels heteroscedastic_kernels() {
#define VIDFAST_TRANSFORMS(P)                                                                                     \
  {                                                                                                               \
    passes_of<P, Transform::softplus>(), passes_of<P, Transform::exp>(), passes_of<P, Transform::log_variance>(), \
        passes_of<P, Transform::clamp>()                                                                          \
  }
  return {{VIDFAST_TRANSFORMS(float), VIDFAST_TRANSFORMS(double), VIDFAST_TRANSFORMS(bf16), VIDFAST_TRANSFORMS(f16)},
          {{gather<VF, float>, nullptr, gather<VF, bf16>, gather<VF, f16>},
           {gather<VD, float>, gather<VD, double>, gather<VD, bf16>, gather<VD, f16>}},
          {{scatter<VF, float>, nullptr, scatter<VF, bf16>, scatter<VF, f16>},
           {scatter<VD, float>, scatter<VD, double>, scatter<VD, bf16>, scatter<VD, f16>}},
          {functions_of<VF>(), functions_of<VD>()}};
#undef VIDFAST_TRANSFORMS
}

}  // namespace
}  // namespace vidfast::cpu
