// exp, log and log1p over the vectors of whichever simd_*.h was included before, in fp32 and fp64.
//
// Errors of results that are normal numbers, measured over every fp32 number of the arguments named and over some
// million in fp64 (tests/core/test_vector_math.py): at most 1 ulp of exp and log, 2 ulp of log1p. Below it results are
// rounded into the subnormal numbers, where nothing else is said. NaN stays NaN.
//
// Polynomials are minimax in relative error, by Remez's exchange in 200 bits; the error of each is below 6e-9 in fp32
// and 2e-18 in fp64.
#pragma once

#include <limits>
#include <type_traits>

namespace vidfast::cpu {
namespace {

// Vectors that are plain arrays (simd_baseline.h) call these functions: written out each time they would be a megabyte.
#ifdef VIDFAST_ARRAYS
#define VIDFAST_VECTOR_FUNCTION __attribute__((noinline))
#else
#define VIDFAST_VECTOR_FUNCTION inline
#endif

template <class V>
constexpr bool kIsFloat = std::is_same_v<typename V::Scalar, float>;

// c[0] + c[1] x + ...
template <class V, size_t N>
inline typename V::reg polynomial(typename V::reg x, const typename V::Scalar (&c)[N]) {
  typename V::reg sum = V::set1(c[N - 1]);
  for (size_t i = N - 1; i > 0; --i) sum = V::multiply_add(sum, x, V::set1(c[i - 1]));
  return sum;
}

// What exp of x is times a power of two: exp(x) = result 2^n, n whole and the result from 0.7 to 1.42.
template <class V>
VIDFAST_VECTOR_FUNCTION typename V::reg reduced_exponential(typename V::reg x, typename V::reg* n) {
  using S = typename V::Scalar;
  using reg = typename V::reg;
  constexpr S kHigh = kIsFloat<V> ? S(0.693359375) : S(6.93147180369123816490e-01);  // log 2 in two parts
  constexpr S kLow = kIsFloat<V> ? S(-2.12194440e-4) : S(1.90821492927058770002e-10);
  *n = V::nearest(V::mul(x, V::set1(S(1.4426950408889634074))));
  const reg r = V::multiply_add(*n, V::set1(-kLow), V::multiply_add(*n, V::set1(-kHigh), x));
  reg p;
  if constexpr (kIsFloat<V>)
    p = polynomial<V>(r, {0x1.fffffb9a570acp-2f, 0x1.555491541aa7ep-3f, 0x1.5558f17dd02abp-5f, 0x1.1239e2a769c6ap-7f,
                          0x1.6a2433c206ba4p-10f});
  else
    p = polynomial<V>(r, {0.5, 0x1.555555555555bp-3, 0x1.5555555555503p-5, 0x1.111111110ec5dp-7, 0x1.6c16c16c3048ep-10,
                          0x1.a01a01b37e34fp-13, 0x1.a01a01368ece6p-16, 0x1.71ddf020d45a0p-19, 0x1.27e5b447b7c52p-22,
                          0x1.af6be7db3dc11p-26, 0x1.1e3d2ae1b9f58p-29});
  return V::add(V::multiply_add(V::mul(r, r), p, r), V::set1(1));
}

// exp(x) for every x: 0 and infinity at the ends.
template <class V>
VIDFAST_VECTOR_FUNCTION typename V::reg exponential(typename V::reg x) {
  using S = typename V::Scalar;
  constexpr S kLowest = kIsFloat<V> ? S(-105) : S(-746), kHighest = kIsFloat<V> ? S(89) : S(710);
  x = V::smallest(V::set1(kHighest), V::largest(V::set1(kLowest), x));
  typename V::reg n;
  const typename V::reg p = reduced_exponential<V>(x, &n);
  return V::scale_by(p, n);
}

// exp(x) for x <= 0: 0 below -87 (fp32) or -708 (fp64), from where on it is soon no normal number.
template <class V>
VIDFAST_VECTOR_FUNCTION typename V::reg exponential_of_negative(typename V::reg x) {
  using S = typename V::Scalar;
  using reg = typename V::reg;
  const reg lowest = V::set1(kIsFloat<V> ? S(-87) : S(-708));
  reg n;
  const reg p = reduced_exponential<V>(V::largest(lowest, x), &n);
  const reg found = V::where_less(x, lowest, V::set1(0), V::add_to_exponent(p, n));
  // of a NaN in fp64 the exponent may be another one now
  return kIsFloat<V> ? found : V::where_less(x, V::set1(1), found, x);
}

// log(1 + f) = f - (f^2/2 - s (f^2/2 + rest)) with s = f / (2 + f): what is behind f, by atanh's series (fp64).
template <class V>
VIDFAST_VECTOR_FUNCTION typename V::reg beyond_first_order(typename V::reg f, typename V::reg more) {
  using reg = typename V::reg;
  const reg half_square = V::mul(V::mul(f, f), V::set1(0.5));
  const reg s = V::div(f, V::add(f, V::set1(2)));
  const reg z = V::mul(s, s);
  const reg series =
      polynomial<V>(z, {0x1.5555555555535p-2, 0x1.99999999a085bp-3, 0x1.24924920848eep-3, 0x1.c71c742002e6ap-4,
                        0x1.745cb38a61e0ep-4, 0x1.3b1de49cf8b6cp-4, 0x1.1067549ce6f17p-4, 0x1.efdec937dcfe6p-5,
                        0x1.559696c02ce6cp-5, 0x1.5c8fc8dbad3bap-4});
  const reg rest = V::mul(V::add(z, z), series);
  return V::sub(V::multiply_add(s, V::add(half_square, rest), more), half_square);
}

// log(1 + e) for e from 0 to 1.
template <class V>
VIDFAST_VECTOR_FUNCTION typename V::reg log_one_plus(typename V::reg e) {
  if constexpr (kIsFloat<V>) {
    const auto p = polynomial<V>(e, {-0x1.ffffd2e0c01bep-2f, 0x1.554def80acc0ep-2f, -0x1.ff26e0d7087f8p-3f,
                                     0x1.935c9eabbca99p-3f, -0x1.3a7a7f58a58d8p-3f, 0x1.b579bd4a2e2fdp-4f,
                                     -0x1.d8631c8b373dep-5f, 0x1.4b08308a0d552p-6f, -0x1.b2f582bb2f732p-9f});
    return V::multiply_add(V::mul(e, e), p, e);
  } else {
    return V::add(e, beyond_first_order<V>(e, V::set1(0)));
  }
}

// log(x) = k log 2 + log(fraction) for x = 2^k fraction, with fraction from sqrt(1/2) to sqrt(2).
template <class V>
VIDFAST_VECTOR_FUNCTION typename V::reg logarithm_of_parts(typename V::reg k, typename V::reg fraction) {
  using S = typename V::Scalar;
  using reg = typename V::reg;
  constexpr S kHigh = kIsFloat<V> ? S(0.693359375) : S(6.93147180369123816490e-01);
  constexpr S kLow = kIsFloat<V> ? S(-2.12194440e-4) : S(1.90821492927058770002e-10);
  const reg f = V::sub(fraction, V::set1(1));
  const reg low = V::mul(k, V::set1(kLow));
  reg rest;
  if constexpr (kIsFloat<V>) {
    const reg p = polynomial<V>(
        f, {0x1.5555543eabe68p-2f, -0x1.000227180a9afp-2f, 0x1.99a0081c4bd60p-3f, -0x1.54723c178bcb2p-3f,
            0x1.22da1a02978fdp-3f, -0x1.0d8597e824bb1p-3f, 0x1.055bad587e3adp-3f, -0x1.38b4487485020p-4f});
    const reg square = V::mul(f, f);
    rest = V::multiply_add(V::set1(S(-0.5)), square, V::multiply_add(V::mul(f, square), p, low));
  } else {
    rest = beyond_first_order<V>(f, low);
  }
  return V::multiply_add(k, V::set1(kHigh), V::add(f, rest));
}

// log(x) for x that is a positive normal number, infinity or NaN.
template <class V>
VIDFAST_VECTOR_FUNCTION typename V::reg logarithm_of_normal(typename V::reg x) {
  typename V::reg fraction;
  const typename V::reg k = V::split(x, &fraction);
  return V::where_less(x, V::set1(std::numeric_limits<typename V::Scalar>::infinity()),
                       logarithm_of_parts<V>(k, fraction), x);
}

// log(x) for x >= 0: minus infinity at 0.
template <class V>
VIDFAST_VECTOR_FUNCTION typename V::reg logarithm(typename V::reg x) {
  using S = typename V::Scalar;
  using reg = typename V::reg;
  const reg infinity = V::set1(std::numeric_limits<S>::infinity());
  const reg tiny = V::set1(std::numeric_limits<S>::min());
  reg fraction;
  const reg k = V::split(V::where_less(x, tiny, V::mul(x, V::set1(S(0x1p54))), x), &fraction);
  const reg shift = V::where_less(x, tiny, V::set1(-54), V::set1(0));
  const reg found = logarithm_of_parts<V>(V::add(k, shift), fraction);
  return V::where_less(V::set1(0), x, V::where_less(x, infinity, found, x), V::sub(x, infinity));  // NaN stays NaN
}

}  // namespace
}  // namespace vidfast::cpu
