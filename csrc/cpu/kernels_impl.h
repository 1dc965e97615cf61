// The tile kernels, written once over the vector type of whichever simd_*.h was included before this file.
// Everything is in an unnamed namespace: each instruction set's translation unit keeps its own copy.
//
// Order of summation: 4 vectors of running sums, or in a short run one, at most kRun values each in the compute type,
// then fp64.
#pragma once

#include <cmath>

#include "kernel_weights.h"

namespace vidfast::cpu {
namespace {

#if defined(__clang__)
#define VIDFAST_NO_CARRY _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define VIDFAST_NO_CARRY _Pragma("GCC ivdep")
#else
#define VIDFAST_NO_CARRY
#endif

// Of a loop over elements: all that it calls becomes part of it, lambdas too. There are so many of these loops that a
// compiler would keep what they share apart, with what is captured in memory and constants made anew at each call.
#define VIDFAST_FLAT __attribute__((flatten))

// A run of fewer elements adds at most kRun values in each place of a vector.
template <class V>
constexpr int64_t kShortRun = kRun / 2 * V::W;

// What is known of a weight. Where it is 0 nothing comes of mean and target, nor of a scale that is not finite.
enum class Weight { kOne, kNotZero, kAny };

// One element of weight w, and what it adds to the sum of w r^2.
template <class V, Weight kind, class M, class T>
inline typename V::Scalar element(const M* m, const T* t, typename V::Scalar w, M* gm, T* gt, int64_t i,
                                  typename V::Scalar scale) {
  using S = typename V::Scalar;
  S r = V::get(m + i) - V::get(t + i), x = r;
  if (kind == Weight::kAny) r = w != 0 ? r : S(0);
  if (kind != Weight::kOne) x = w * r;
  S g = x * scale;
  if (kind == Weight::kAny) g = w != 0 ? g : S(0);
  if (gm != nullptr) V::put(gm + i, g);
  if (gt != nullptr) V::put(gt + i, kind == Weight::kAny ? S(0) - g : -g);  // the former gives no -0
  return x * r;
}

// Which gradients are written; kAsked: those that are not nullptr. With weights loops are too long for a compiler to
// make one for each case by itself.
enum class Writes { kNothing, kMean, kAsked };
template <Writes writes, class M>
inline bool writes_mean(const M* gm) {
  return writes == Writes::kMean || (writes == Writes::kAsked && gm != nullptr);
}
template <Writes writes, class T>
inline bool writes_target(const T* gt) {
  return writes == Writes::kAsked && gt != nullptr;
}

// A vector of elements, and `sum` with what they add to it.
template <class V, Weight kind, bool Sum, Writes writes, class M, class T>
inline typename V::reg elements(const M* m, const T* t, typename V::reg w, M* gm, T* gt, int64_t i,
                                typename V::reg scale, typename V::reg sum, bool stream) {
  using reg = typename V::reg;
  reg r = V::sub(V::load(m + i), V::load(t + i)), x = r;
  if (kind == Weight::kAny) r = V::where_not_zero(r, w);
  if (kind != Weight::kOne) x = V::mul(w, r);
  if (writes != Writes::kNothing) {
    reg g = V::mul(x, scale);
    if (kind == Weight::kAny) g = V::where_not_zero(g, w);
    if (writes_mean<writes>(gm)) put<V>(gm + i, g, stream);
    if (writes_target<writes>(gt)) V::store(gt + i, kind == Weight::kAny ? V::sub(V::set1(0), g) : V::neg(g));
  }
  return Sum ? V::multiply_add(x, r, sum) : sum;
}

// The same, with weights of 0 and 1 as bytes from `w` on, and a scale that is finite.
template <class V, bool Sum, Writes writes, class M, class T>
inline typename V::reg flagged(const M* m, const T* t, const uint8_t* w, M* gm, T* gt, int64_t i, typename V::reg scale,
                               typename V::reg sum, bool stream) {
  using reg = typename V::reg;
  const reg r = V::where_byte(V::sub(V::load(m + i), V::load(t + i)), w);
  if (writes != Writes::kNothing) {
    const reg g = V::mul(r, scale);
    if (writes_mean<writes>(gm)) put<V>(gm + i, g, stream);
    if (writes_target<writes>(gt)) V::store(gt + i, V::sub(V::set1(0), g));
  }
  return Sum ? V::multiply_add(r, r, sum) : sum;
}

// One run, with a weight an element in P; returns sum w r^2.
template <class V, class M, class T, class P, bool Sum, Writes writes>
VIDFAST_FLAT double run(const M* m, const T* t, const P* w, M* gm, T* gt, int64_t n, typename V::Scalar scale,
                        bool stream) {
  using S = typename V::Scalar;
  using reg = typename V::reg;
  constexpr int64_t W = V::W;
  constexpr Weight kind = kWeighted<P> ? Weight::kAny : Weight::kOne;
  const reg vscale = V::set1(scale);
  int64_t i = 0;

  S edge = 0;  // the head before alignment and the tail, less than a line each
  const auto one = [&](int64_t at) {
    S weight = 1;
    if constexpr (kWeighted<P>) weight = V::get(w + at);
    const S square = element<V, kind>(m, t, weight, gm, gt, at, scale);
    if (Sum) edge += square;
  };
  // Whole lines only: a partial line written past the cache costs more than it saves.
  if (writes != Writes::kNothing && stream)
    for (; i < n && reinterpret_cast<uintptr_t>(gm + i) % kLine != 0; ++i) one(i);

  const auto vector = [&](int64_t at, reg sum, bool past) {
    reg weight = V::set1(1);
    if constexpr (kWeighted<P>) weight = V::load(w + at);
    return elements<V, kind, Sum, writes>(m, t, weight, gm, gt, at, vscale, sum, past);
  };
  // The same where weights are 0 or 1, which most of a mask's are, for fewer instructions.
  const bool finite = writes == Writes::kNothing || std::isfinite(scale);  // 0 times it is 0
  const auto of_flags = [&](int64_t at, reg sum) {
    if constexpr (std::is_same_v<P, uint8_t>)
      return flagged<V, Sum, writes>(m, t, w + at, gm, gt, at, vscale, sum, stream);
    else
      return sum;
  };
  typename V::wide total = V::wide_zero();
  const reg zero = V::set1(0);
  reg rest = zero;
  while (n - i >= 4 * W) {
    const int64_t left = (n - i) / (4 * W);
    const int64_t blocks = left < kRun ? left : kRun;
    reg a0 = zero, a1 = zero, a2 = zero, a3 = zero;
    for (int64_t b = 0; b < blocks; ++b, i += 4 * W) {
      if constexpr (kWeighted<P>) {
        const Content content = V::content_of(w + i);
        if (content == Content::kNothing) {
          if (writes_mean<writes>(gm)) clear_vectors<V, 4>(gm + i, stream);
          if (writes_target<writes>(gt)) clear_vectors<V, 4>(gt + i, false);
          continue;
        }
        prefetch_ahead<4 * W>(m + i);
        prefetch_ahead<4 * W>(t + i);
        if (content == Content::kFlags && finite) {
          a0 = of_flags(i, a0);
          a1 = of_flags(i + W, a1);
          a2 = of_flags(i + 2 * W, a2);
          a3 = of_flags(i + 3 * W, a3);
          continue;
        }
      }
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

template <Writes writes>
using Constant = std::integral_constant<Writes, writes>;

template <class V, class M, class T, class P, bool Sum, bool Grad>
inline void runs(const Runs& job, bool stream) {
  const M* m = static_cast<const M*>(job.mean);
  const T* t = static_cast<const T*>(job.target);
  const P* w = static_cast<const P*>(job.weights);
  M* gm = Grad ? static_cast<M*>(job.grad_mean) : nullptr;
  T* gt = Grad && !Sum ? static_cast<T*>(job.grad_target) : nullptr;
  bool nothing = false;
  if constexpr (kWeighted<P>) nothing = all_zero(w, job.n * static_cast<int64_t>(sizeof(P)));
  for (int64_t c = 0; c < job.channels; ++c) {
    const auto scale = Grad ? static_cast<typename V::Scalar>(job.scale[c]) : typename V::Scalar(0);
    double sum = 0;
    if (nothing) {
      clear<V>(gm, job.n, stream);
      clear<V>(gt, job.n, false);
    } else {
      const auto with = [&](auto writes) {
        sum = run<V, M, T, P, Sum, decltype(writes)::value>(m, t, w, gm, gt, job.n, scale, stream);
      };
      if constexpr (!Grad)
        with(Constant<Writes::kNothing>());
      else if constexpr (Sum)
        with(Constant<Writes::kMean>());
      else if constexpr (!kWeighted<P>)
        with(Constant<Writes::kAsked>());
      else if (gt == nullptr)
        with(Constant<Writes::kMean>());
      else
        with(Constant<Writes::kAsked>());
    }
    if (Sum) job.sum_sq[c] = job.add ? job.sum_sq[c] + sum : sum;
    m += job.n;
    t += job.n;
    if (gm != nullptr) gm += job.n;
    if (gt != nullptr) gt += job.n;
  }
  if (Grad && stream) V::fence();
}

template <class V, class M, class T, TileWeights Kind, bool Sum, bool Grad>
VIDFAST_FLAT void tile(const Tile& job, bool stream) {
  using S = typename V::Scalar;
  using reg = typename V::reg;
  constexpr int64_t W = V::W;
  constexpr Weight kind = Kind == kTileOnes ? Weight::kOne : Kind == kTileByRow ? Weight::kNotZero : Weight::kAny;
  constexpr Writes writes = !Grad ? Writes::kNothing : Sum ? Writes::kMean : Writes::kAsked;
  const S* scale = static_cast<const S*>(job.scale);
  const int64_t columns = job.columns;
  alignas(64) S sums[kTileColumns];
  alignas(64) S weights[Kind == kTileByColumn ? kTileColumns + W : 1];
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
      S weight = 1;
      if constexpr (Kind == kTileByRow) weight = row_weight<S>(job, row);
      bool nothing = weight == 0;
      if constexpr (Kind == kTileByColumn) nothing = !spread_row<V>(job, row, weights);
      if (nothing) {
        clear<V>(gm, columns, stream);
        clear<V>(gt, columns, false);
        continue;
      }
      const reg row_weights = V::set1(weight);
      int64_t j = 0;
      for (; columns - j >= W; j += W) {
        reg w = row_weights, sum = row_weights, scales = row_weights;
        if constexpr (Kind == kTileByColumn) w = V::load(weights + j);
        if (Grad) scales = V::load(scale + j);
        if (Sum) sum = V::load(sums + j);
        sum = elements<V, kind, Sum, writes>(m, t, w, gm, gt, j, scales, sum, stream);
        if (Sum) V::store(sums + j, sum);
      }
      for (; j < columns; ++j) {
        if constexpr (Kind == kTileByColumn) weight = weights[j];
        const S square = element<V, kind>(m, t, weight, gm, gt, j, Grad ? scale[j] : S(0));
        if (Sum) sums[j] += square;
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
  template <class P>
  static constexpr Passes<Runs> over_runs() {
    return {runs<V, M, T, P, true, false>, runs<V, M, T, P, true, true>, runs<V, M, T, P, false, true>};
  }
  template <TileWeights Kind>
  static constexpr Passes<Tile> over_tile() {
    return {tile<V, M, T, Kind, true, false>, tile<V, M, T, Kind, true, true>, tile<V, M, T, Kind, false, true>};
  }
  static constexpr Kernels table() {
    return {{over_runs<Ones>(), over_runs<uint8_t>(), over_runs<typename V::Scalar>()},
            {over_tile<kTileOnes>(), over_tile<kTileByRow>(), over_tile<kTileByColumn>()}};
  }
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

constexpr InstructionSet instruction_set(const char* name, const HeadKernels* (*head)(DType),
                                         const HeteroscedasticKernels& (*heteroscedastic)()) {
  return {
      name,
      head,
      heteroscedastic,
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
