// The tile kernels, written once over the vector type of whichever simd_*.h was included before this file.
// Everything is in an unnamed namespace: each instruction set's translation unit keeps its own copy.
//
// Order of summation: 4 vectors of running sums, or in a short run one, at most kRun values each in the compute type,
// then fp64.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace vidfast::cpu {
namespace {

#if defined(__clang__)
#define VIDFAST_NO_CARRY _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define VIDFAST_NO_CARRY _Pragma("GCC ivdep")
#else
#define VIDFAST_NO_CARRY
#endif

constexpr int64_t kLine = 64;
// A run of fewer elements adds at most kRun values in each place of a vector.
template <class V>
constexpr int64_t kShortRun = kRun / 2 * V::W;

template <class V, class P>
inline void put(P* p, typename V::reg a, bool stream) {
  if (stream)
    V::stream(p, a);
  else
    V::store(p, a);
}

// One element; returns r.
template <class V, class M, class T>
inline typename V::Scalar element(const M* m, const T* t, M* gm, T* gt, int64_t i, typename V::Scalar scale) {
  const typename V::Scalar r = V::get(m + i) - V::get(t + i);
  const typename V::Scalar g = r * scale;
  if (gm != nullptr) V::put(gm + i, g);
  if (gt != nullptr) V::put(gt + i, -g);
  return r;
}

// One run; returns sum r^2.
template <class V, class M, class T, bool Sum, bool Grad>
inline double run(const M* m, const T* t, M* gm, T* gt, int64_t n, typename V::Scalar scale, bool stream) {
  using S = typename V::Scalar;
  using reg = typename V::reg;
  constexpr int64_t W = V::W;
  const reg vscale = V::set1(scale);
  int64_t i = 0;

  S edge = 0;  // the head before alignment and the tail, less than a line each
  const auto one = [&](int64_t at) {
    const S r = element<V>(m, t, gm, gt, at, scale);
    if (Sum) edge += r * r;
  };
  if (Grad && stream)  // whole lines only: a partial line written past the cache costs more than it saves
    for (; i < n && reinterpret_cast<uintptr_t>(gm + i) % kLine != 0; ++i) one(i);

  const auto vector = [&](int64_t at, reg sum, bool past) {
    const reg r = V::sub(V::load(m + at), V::load(t + at));
    if (Grad) {
      const reg g = V::mul(r, vscale);
      if (Sum || gm != nullptr) put<V>(gm + at, g, past);
      if (!Sum && gt != nullptr) V::store(gt + at, V::neg(g));
    }
    return Sum ? V::square_add(r, sum) : sum;
  };
  typename V::wide total = V::wide_zero();
  const reg zero = V::set1(0);
  reg rest = zero;
  while (n - i >= 4 * W) {
    const int64_t left = (n - i) / (4 * W);
    const int64_t blocks = left < kRun ? left : kRun;
    reg a0 = zero, a1 = zero, a2 = zero, a3 = zero;
    for (int64_t b = 0; b < blocks; ++b, i += 4 * W) {
      a0 = vector(i, a0, stream);
      a1 = vector(i + W, a1, stream);
      a2 = vector(i + 2 * W, a2, stream);
      a3 = vector(i + 3 * W, a3, stream);
    }
    if (!Sum) continue;
    if (n <= kShortRun<V>) {  // so few that they may stay in the compute type: widening costs more than a run of 49
      rest = V::add(V::add(a0, a1), V::add(a2, a3));
      break;
    }
    total = V::wide_add(total, a0);
    total = V::wide_add(total, a1);
    total = V::wide_add(total, a2);
    total = V::wide_add(total, a3);
  }
  for (; n - i >= W; i += W) rest = vector(i, rest, false);
  for (; i < n; ++i) one(i);
  if (!Sum) return 0;
  return V::wide_sum(V::wide_add(total, rest)) + static_cast<double>(edge);
}

template <class V, class M, class T, bool Sum, bool Grad>
inline void runs(const Runs& job, bool stream) {
  const M* m = static_cast<const M*>(job.mean);
  const T* t = static_cast<const T*>(job.target);
  M* gm = Grad ? static_cast<M*>(job.grad_mean) : nullptr;
  T* gt = Grad && !Sum ? static_cast<T*>(job.grad_target) : nullptr;
  for (int64_t c = 0; c < job.channels; ++c) {
    const auto scale = Grad ? static_cast<typename V::Scalar>(job.scale[c]) : typename V::Scalar(0);
    const double sum = run<V, M, T, Sum, Grad>(m, t, gm, gt, job.n, scale, stream);
    if (Sum) job.sum_sq[c] = job.add ? job.sum_sq[c] + sum : sum;
    m += job.n;
    t += job.n;
    if (gm != nullptr) gm += job.n;
    if (gt != nullptr) gt += job.n;
  }
  if (Grad && stream) V::fence();
}

template <class V, class M, class T, bool Sum, bool Grad>
inline void tile(const Tile& job, bool stream) {
  using S = typename V::Scalar;
  using reg = typename V::reg;
  constexpr int64_t W = V::W;
  const S* scale = static_cast<const S*>(job.scale);
  const int64_t columns = job.columns;
  alignas(64) S sums[kTileColumns];
  if (Sum)
    for (int64_t j = 0; j < columns; ++j) job.sum_sq[j] = 0;

  for (int64_t row = 0; row < job.rows;) {
    const int64_t stop = job.rows - row < kRun ? job.rows : row + kRun;
    if (Sum)
      for (int64_t j = 0; j < columns; ++j) sums[j] = 0;
    for (; row < stop; ++row) {
      const M* m = static_cast<const M*>(job.mean) + row * job.mean_stride;
      const T* t = static_cast<const T*>(job.target) + row * job.target_stride;
      M* gm = Grad && job.grad_mean != nullptr ? static_cast<M*>(job.grad_mean) + row * job.grad_mean_stride : nullptr;
      T* gt = Grad && !Sum && job.grad_target != nullptr
                  ? static_cast<T*>(job.grad_target) + row * job.grad_target_stride
                  : nullptr;
      int64_t j = 0;
      for (; columns - j >= W; j += W) {
        const reg r = V::sub(V::load(m + j), V::load(t + j));
        if (Grad) {
          const reg g = V::mul(r, V::load(scale + j));
          if (Sum || gm != nullptr) put<V>(gm + j, g, stream);
          if (!Sum && gt != nullptr) V::store(gt + j, V::neg(g));
        }
        if (Sum) V::store(sums + j, V::square_add(r, V::load(sums + j)));
      }
      for (; j < columns; ++j) {
        const S r = element<V>(m, t, gm, gt, j, Grad ? scale[j] : S(0));
        if (Sum) sums[j] += r * r;
      }
    }
    if (Sum)
      for (int64_t j = 0; j < columns; ++j) job.sum_sq[j] += static_cast<double>(sums[j]);
  }
  if (Grad && stream) V::fence();
}

template <class M, class T>
struct Pair {
  using V = std::conditional_t<std::is_same_v<M, double> || std::is_same_v<T, double>, VD, VF>;
  static void sum_runs(const Runs& r) { runs<V, M, T, true, false>(r, false); }
  static void sum_grad_runs(const Runs& r, bool stream) { runs<V, M, T, true, true>(r, stream); }
  static void grad_runs(const Runs& r, bool stream) { runs<V, M, T, false, true>(r, stream); }
  static void sum_tile(const Tile& t) { tile<V, M, T, true, false>(t, false); }
  static void sum_grad_tile(const Tile& t, bool stream) { tile<V, M, T, true, true>(t, stream); }
  static void grad_tile(const Tile& t, bool stream) { tile<V, M, T, false, true>(t, stream); }
  static constexpr Kernels table() { return {sum_runs, sum_grad_runs, grad_runs, sum_tile, sum_grad_tile, grad_tile}; }
};

template <class P>
void scale_row(const void* src, void* dst, int64_t n, double g) {
  using V = std::conditional_t<std::is_same_v<P, double>, VD, VF>;
  using S = typename V::Scalar;
  const P* s = static_cast<const P*>(src);
  P* d = static_cast<P*>(dst);
  const auto vg = V::set1(static_cast<S>(g));
  int64_t i = 0;
  for (; n - i >= 4 * V::W; i += 4 * V::W) {
    for (int64_t u = 0; u < 4; ++u) V::store(d + i + u * V::W, V::mul(V::load(s + i + u * V::W), vg));
  }
  for (; i < n; ++i) V::put(d + i, V::get(s + i) * static_cast<S>(g));
}

// On bits, which compilers make vectors of: a half precision is never widened.
template <class P>
void positive_row(void* x, int64_t n) {
  if constexpr (std::is_floating_point_v<P>) {
    P* v = static_cast<P*>(x);
    for (int64_t i = 0; i < n; ++i) v[i] = v[i] < P(0) ? P(0) : v[i];  // NaN is not below 0
  } else {
    constexpr int16_t kInfinity = std::is_same_v<P, bf16> ? 0x7f80 : 0x7c00;
    int16_t* v = static_cast<int16_t*>(x);
    for (int64_t i = 0; i < n; ++i) {
      const int16_t size = v[i] & int16_t(0x7fff);
      const int16_t keep = int16_t(v[i] >= 0) | int16_t(size > kInfinity);  // NaN stays
      v[i] = keep ? v[i] : int16_t(0);
    }
  }
}

// `out` may be either of the others: no element depends on another.
template <class P>
void where_positive_row(const void* gradient, const void* activation, void* out, int64_t n) {
  using Bits = std::conditional_t<sizeof(P) == 8, uint64_t, std::conditional_t<sizeof(P) == 4, uint32_t, uint16_t>>;
  const Bits* g = static_cast<const Bits*>(gradient);
  const Bits* a = static_cast<const Bits*>(activation);
  Bits* d = static_cast<Bits*>(out);
  VIDFAST_NO_CARRY
  for (int64_t i = 0; i < n; ++i) {
    const Bits zero = Bits(a[i] << 1) == 0;  // without its sign
    d[i] = g[i] & Bits(zero - 1);
  }
}

template <class P>
void round_row(float* x, int64_t n) {
  if constexpr (sizeof(P) < sizeof(float)) {
    P half[VF::W];
    int64_t i = 0;
    for (; n - i >= VF::W; i += VF::W) {
      VF::store(half, VF::load(x + i));
      VF::store(x + i, VF::load(half));
    }
    for (; i < n; ++i) {
      VF::put(half, x[i]);
      x[i] = VF::get(half);
    }
  }
}

constexpr InstructionSet instruction_set(const char* name, const HeadKernels* (*head)(DType)) {
  return {
      name,
      head,
      {{Pair<float, float>::table(), Pair<float, double>::table(), Pair<float, bf16>::table(),
        Pair<float, f16>::table()},
       {Pair<double, float>::table(), Pair<double, double>::table(), Pair<double, bf16>::table(),
        Pair<double, f16>::table()},
       {Pair<bf16, float>::table(), Pair<bf16, double>::table(), Pair<bf16, bf16>::table(), Pair<bf16, f16>::table()},
       {Pair<f16, float>::table(), Pair<f16, double>::table(), Pair<f16, bf16>::table(), Pair<f16, f16>::table()}},
      {scale_row<float>, scale_row<double>, scale_row<bf16>, scale_row<f16>},
      {positive_row<float>, positive_row<double>, positive_row<bf16>, positive_row<f16>},
      {where_positive_row<float>, where_positive_row<double>, where_positive_row<bf16>, where_positive_row<f16>},
      {round_row<float>, round_row<double>, round_row<bf16>, round_row<f16>}};
}

}  // namespace
}  // namespace vidfast::cpu
