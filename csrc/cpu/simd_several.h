// Several vectors as one, for kernels whose chains of dependent instructions are longer than a processor looks ahead:
// each step is done for all of them before the next. Over the vectors of whichever simd_*.h was included before.
#pragma once

#include <cstdint>

namespace vidfast::cpu {
namespace {

template <class V, int U>
struct Several {
  using Scalar = typename V::Scalar;
  static constexpr int W = U * V::W;
  struct reg {
    typename V::reg v[U];
  };
  using wide = typename V::wide;

  template <class Function>
  static inline reg each(const Function& function) {
    reg r;
    for (int u = 0; u < U; ++u) r.v[u] = function(u);
    return r;
  }

  template <class P>
  static inline reg load(const P* p) {
    return each([&](int u) { return V::load(p + u * V::W); });
  }
  template <class P>
  static inline void store(P* p, const reg& a) {
    for (int u = 0; u < U; ++u) V::store(p + u * V::W, a.v[u]);
  }
  template <class P>
  static inline void stream(P* p, const reg& a) {
    for (int u = 0; u < U; ++u) V::stream(p + u * V::W, a.v[u]);
  }
  static void fence() { V::fence(); }

  static inline reg set1(Scalar x) {
    return each([&](int) { return V::set1(x); });
  }
#define VIDFAST_EACH_1(name)                             \
  static inline reg name(const reg& a) {                 \
    return each([&](int u) { return V::name(a.v[u]); }); \
  }
#define VIDFAST_EACH_2(name)                                     \
  static inline reg name(const reg& a, const reg& b) {           \
    return each([&](int u) { return V::name(a.v[u], b.v[u]); }); \
  }
  VIDFAST_EACH_1(neg)
  VIDFAST_EACH_1(absolute)
  VIDFAST_EACH_1(nearest)
  VIDFAST_EACH_2(add)
  VIDFAST_EACH_2(sub)
  VIDFAST_EACH_2(mul)
  VIDFAST_EACH_2(div)
  VIDFAST_EACH_2(largest)
  VIDFAST_EACH_2(smallest)
  VIDFAST_EACH_2(scale_by)
  VIDFAST_EACH_2(add_to_exponent)
  VIDFAST_EACH_2(where_not_zero)
#undef VIDFAST_EACH_1
#undef VIDFAST_EACH_2
  static inline reg multiply_add(const reg& a, const reg& b, const reg& c) {
    return each([&](int u) { return V::multiply_add(a.v[u], b.v[u], c.v[u]); });
  }
  static inline reg where_less(const reg& a, const reg& b, const reg& x, const reg& y) {
    return each([&](int u) { return V::where_less(a.v[u], b.v[u], x.v[u], y.v[u]); });
  }
  static inline reg split(const reg& x, reg* fraction) {
    return each([&](int u) { return V::split(x.v[u], &fraction->v[u]); });
  }

  static wide wide_zero() { return V::wide_zero(); }
  static inline wide wide_add(wide w, const reg& a) {
    for (int u = 0; u < U; ++u) w = V::wide_add(w, a.v[u]);
    return w;
  }
  static double wide_sum(const wide& w) { return V::wide_sum(w); }
};

}  // namespace
}  // namespace vidfast::cpu
