// One element: from r and raw to its term of the loss and its gradients, in fp32 or fp64. The formulas are those of
// csrc/heteroscedastic.h; here they are arranged so that nothing overflows and NaN stays NaN.
#pragma once

#include <math.h>

#include "heteroscedastic_args.h"

namespace vidfast::cuda {

// The accurate functions, never the fast ones: a term's error must stay that of its rounding.
__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }
__device__ inline float log1p_of(float x) { return log1pf(x); }
__device__ inline double log1p_of(double x) { return log1p(x); }
__device__ inline float sqrt_of(float x) { return sqrtf(x); }
__device__ inline double sqrt_of(double x) { return sqrt(x); }
__device__ inline float absolute(float x) { return fabsf(x); }
__device__ inline double absolute(double x) { return fabs(x); }

// v = base exp(shift): v itself may overflow where its logarithm does not.
template <class Acc>
struct Variance {
  Acc base, shift;
  Acc inverse;  // 1 / v; of log_variance its root
  Acc slope;    // (dv / d raw) / v
};

// r / v, which is 0 where r is, also where 1 / v would overflow.
template <Transform K, class Acc>
__device__ inline Acc quotient_of(Acc r, const Variance<Acc>& v) {
  if constexpr (K == Transform::log_variance)
    return r * v.inverse * v.inverse;
  else
    return K == Transform::clamp ? r / v.base : r * v.inverse;
}

template <Transform K, class Acc>
__device__ inline Variance<Acc> variance_of(Acc u, Acc eps, [[maybe_unused]] bool negative_is_nan) {
  if constexpr (K == Transform::log_variance) {
    return {Acc(1), u, exp_of(Acc(-0.5) * u), Acc(1)};
  } else if constexpr (K == Transform::clamp) {
    Acc v = u <= eps ? eps : u;  // NaN goes on
    if (negative_is_nan && u < 0) v = static_cast<Acc>(NAN);
    const Acc inverse = 1 / v;
    return {v, Acc(0), inverse, inverse};
  } else {
    const bool positive = u > 0;
    const Acc e = exp_of(-absolute(u));
    if constexpr (K == Transform::exp) {
      const Acc z = positive ? 1 + eps * e : e + eps;  // v exp(-max(u, 0))
      const Acc inverse = 1 / z;
      return {z, positive ? u : Acc(0), (positive ? e : Acc(1)) * inverse, (positive ? Acc(1) : e) * inverse};
    } else {
      const Acc v = (positive ? u : Acc(0)) + log1p_of(e) + eps;
      const Acc both = 1 / ((1 + e) * v);  // one division for the two
      return {v, Acc(0), (1 + e) * both, (positive ? Acc(1) : e) * both};
    }
  }
}

// What comes of one element.
template <class Acc>
struct Element {
  Acc term;  // w v^beta (log v + r^2 / v + constant), twice the loss over k; with sums
  Acc grad_mean, grad_raw;
};

// gk: k, times the incoming gradient where there is one. w: the element's weight, in masked kernels.
template <Transform K, bool Sum, bool Masked, class Acc>
__device__ inline Element<Acc> element_of(const HeteroscedasticArgs& a, Acc gk, Acc x, Acc y, Acc u,
                                          [[maybe_unused]] Acc w) {
  constexpr bool shifted = K == Transform::exp || K == Transform::log_variance;
  constexpr bool based = K != Transform::log_variance;
  if constexpr (Masked) {
    if (w == 0) x = y = u = 0;  // what does not count may be anything
  }
  const Numbers<Acc>& numbers = a.numbers<Acc>();
  const Variance<Acc> v = variance_of<K>(u, numbers.eps, a.negative_is_nan);
  Acc log_v = 0;
  if (Sum || (based && a.power == Power::other)) log_v = based ? log_of(v.base) : Acc(0);
  Acc weight = 1;  // w v^beta
  if (a.power != Power::none) {
    if (based) {
      weight = v.base;
      if (a.power == Power::half) weight = sqrt_of(v.base);
      if (a.power == Power::other) weight = exp_of(numbers.beta * log_v);
    }
    if (shifted) weight *= exp_of(numbers.beta * v.shift);
  }
  if (shifted) log_v += v.shift;
  if constexpr (Masked) weight *= w;
  const Acc r = x - y;
  const Acc q = quotient_of<K>(r, v);
  Acc factor = gk * weight;
  if constexpr (Masked) {
    if (w == 0) factor = 0;  // though g or k be infinite
  }
  Element<Acc> out;
  out.term = Sum ? weight * (log_v + r * q + numbers.constant) : Acc(0);
  out.grad_mean = factor * q;
  out.grad_raw = Acc(0.5) * factor * (1 - r * q) * v.slope;
  return out;
}

}  // namespace vidfast::cuda
