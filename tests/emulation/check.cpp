// All CUDA primitives on the host against equation 5 in long double, without Python: the program that runs under
// AddressSanitizer and UBSan, and that must fail when a kernel is broken on purpose.
//
//   check [all]     every pair of dtypes (the default), or f32 alone with `check f32`
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "emulation.h"
#include "gaussian_nll.h"

using vidfast::DType;
using vidfast::Problem;
using vidfast::View;
using Real = long double;

namespace {

int failures = 0;
std::string where;

void fail(const std::string& what, Real got, Real want) {
  if (++failures <= 20) std::fprintf(stderr, "%s: %s: got %.9Lg, want %.9Lg\n", where.c_str(), what.c_str(), got, want);
}

struct Random {
  uint64_t state = 88172645463325252ull;
  double operator()() {  // in (-2, 2)
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<double>(state >> 11) * 0x1p-51 - 2;
  }
};

Real get(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::f64: return static_cast<const double*>(p)[i];
    case DType::bf16: return vidfast::cpu::to_float(static_cast<const vidfast::cpu::bf16*>(p)[i]);
    case DType::f16: return vidfast::cpu::to_float(static_cast<const vidfast::cpu::f16*>(p)[i]);
  }
  return 0;
}

void put(void* p, DType t, int64_t i, double x) {
  switch (t) {
    case DType::f32: static_cast<float*>(p)[i] = static_cast<float>(x); break;
    case DType::f64: static_cast<double*>(p)[i] = x; break;
    case DType::bf16: static_cast<vidfast::cpu::bf16*>(p)[i] = vidfast::cpu::to_bf16(static_cast<float>(x)); break;
    case DType::f16: static_cast<vidfast::cpu::f16*>(p)[i] = vidfast::cpu::to_f16(static_cast<float>(x)); break;
  }
}

// What a rounding at x may add: about a unit in the last place (half of one in 16 bits), and the subnormal range.
Real rounding(DType t, Real x) {
  switch (t) {
    case DType::f32: return std::fabs(x) * 0x1p-23L + 1e-37L;
    case DType::f64: return std::fabs(x) * 0x1p-51L + 1e-300L;
    case DType::bf16: return std::fabs(x) * 0x1p-8L + 1e-37L;
    case DType::f16: return std::fabs(x) * 0x1p-11L + 0x1p-24L;
  }
  return 0;
}

struct Shape {
  const char* why;
  int64_t outer, channels, inner;
  int64_t gap = 0;     // elements between rows that belong to somebody else
  int64_t offset = 0;  // elements before the first
};

// An activation in memory of exactly its size, so that the sanitizer sees one element too many. All that is not
// written is NaN.
struct Activation {
  DType dtype;
  int64_t row, stride, outer, elements;
  std::unique_ptr<unsigned char[]> memory;
  View view;

  Activation(const Shape& s, DType t, bool dense)
      : dtype(t), row(s.channels * s.inner), stride(dense ? row : row + s.gap), outer(s.outer) {
    const int64_t offset = dense ? 0 : s.offset;
    elements = (outer - 1) * stride + row;
    const size_t bytes = static_cast<size_t>((offset + elements) * vidfast::size_of(t));
    memory.reset(new unsigned char[bytes]);
    std::memset(memory.get(), 0xff, bytes);
    view = {memory.get() + offset * vidfast::size_of(t), stride, t};
  }
  void fill(Random& random) {
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t j = 0; j < row; ++j) put(view.data, dtype, o * stride + j, random());
  }
  Real at(int64_t o, int64_t j) const { return get(view.data, dtype, o * stride + j); }
  void gaps_untouched() const {
    for (int64_t o = 0; o + 1 < outer; ++o)
      for (int64_t j = row; j < stride; ++j)
        if (const Real x = get(view.data, dtype, o * stride + j); x == x) fail("an element between rows", x, NAN);
  }
};

template <class T>
std::vector<T> poisoned(int64_t n) {
  std::vector<T> v(static_cast<size_t>(n));
  std::memset(v.data(), 0xff, v.size() * sizeof(T));
  return v;
}

void close(const std::string& what, Real got, Real want, Real allowed) {
  if (!(std::fabs(got - want) <= allowed)) fail(what, got, want);
}

void run(const Shape& s, DType mean_dtype, DType target_dtype) {
  const bool wide = mean_dtype == DType::f64 || target_dtype == DType::f64;
  const DType loss_dtype = wide ? DType::f64 : DType::f32;
  const char* names[] = {"f32", "f64", "bf16", "f16"};
  where = std::string(s.why) + " " + names[static_cast<int>(mean_dtype)] + "/" + names[static_cast<int>(target_dtype)];

  Random random;
  Activation mean(s, mean_dtype, false), target(s, target_dtype, false);
  mean.fill(random);
  target.fill(random);
  std::vector<float> alpha(static_cast<size_t>(s.channels));
  for (float& x : alpha) x = static_cast<float>(2 * random());
  const double eps = 1e-5, n = static_cast<double>(s.outer * s.channels * s.inner), k = 1 / n;
  const Problem p{s.outer, s.channels, s.inner, mean.view, target.view, alpha.data(), DType::f32, eps, k, true};

  // Equation 5.
  const Real m = static_cast<Real>(s.outer * s.inner);
  std::vector<Real> sum(alpha.size(), 0), v(alpha.size());
  for (int64_t c = 0; c < s.channels; ++c) {
    const Real a = alpha[static_cast<size_t>(c)];
    v[static_cast<size_t>(c)] = (a > 0 ? a : 0) + std::log1p(std::exp(-std::fabs(a))) + static_cast<Real>(eps);
  }
  for (int64_t o = 0; o < s.outer; ++o)
    for (int64_t j = 0; j < s.channels * s.inner; ++j) {
      const Real r = mean.at(o, j) - target.at(o, j);
      sum[static_cast<size_t>(j / s.inner)] += r * r;
    }
  Real loss = 0.5L * static_cast<Real>(n) * std::log(2 * 3.14159265358979323846264338327950288L), loss_scale = loss;
  std::vector<Real> d_alpha(alpha.size()), d_alpha_scale(alpha.size());
  for (size_t c = 0; c < alpha.size(); ++c) {
    loss += m / 2 * std::log(v[c]) + sum[c] / (2 * v[c]);
    loss_scale += m / 2 * std::fabs(std::log(v[c])) + sum[c] / (2 * v[c]);
    const Real sigmoid = 1 / (1 + std::exp(-static_cast<Real>(alpha[c])));
    d_alpha[c] = static_cast<Real>(k) * (m / (2 * v[c]) - sum[c] / (2 * v[c] * v[c])) * sigmoid;
    d_alpha_scale[c] = static_cast<Real>(k) * (m / (2 * v[c]) + sum[c] / (2 * v[c] * v[c])) * sigmoid;
  }
  loss *= static_cast<Real>(k);
  loss_scale *= static_cast<Real>(k);
  const Real relative = wide ? 1e-13L : 1e-6L;

  const int64_t bytes = vidfast::cuda::workspace_bytes(s.outer, s.channels, s.inner, mean.view.outer_stride,
                                                       target.view.outer_stride, mean_dtype, target_dtype);
  const auto workspace = [&] { return poisoned<uint64_t>((bytes + 7) / 8); };
  const auto check_gradient = [&](const char* what, const Activation& grad, Real g, Real sign, int roundings) {
    for (int64_t o = 0; o < s.outer; ++o)
      for (int64_t j = 0; j < s.channels * s.inner; ++j) {
        const Real want =
            sign * g * static_cast<Real>(k) * (mean.at(o, j) - target.at(o, j)) / v[static_cast<size_t>(j / s.inner)];
        close(what, grad.at(o, j), want,
              roundings * rounding(grad.dtype, want) + std::fabs(want) * (wide ? 1e-15L : 3e-7L));
      }
  };

  // Twice, on another machine and in another order: the bits must be the same.
  std::vector<double> first_sums;
  double first_loss = 0;
  for (int round = 0; round < 2; ++round) {
    emulation::machine().device = round;
    emulation::machine().processors = round == 0 ? 3 : 1;
    emulation::machine().seed += 1;
    double out = NAN;
    auto sum_sq = poisoned<double>(s.channels), grad_alpha = poisoned<double>(s.channels);
    auto space = workspace();
    vidfast::cuda::forward(p, &out, loss_dtype, sum_sq.data(), space.data(), nullptr);
    const Real got = get(&out, loss_dtype, 0);
    close("loss", got, loss, relative * loss_scale + rounding(loss_dtype, loss));
    for (size_t c = 0; c < alpha.size(); ++c) close("sum of squares", sum_sq[c], sum[c], relative * sum[c]);

    Activation grad(s, mean_dtype, true);
    double out_grad = NAN;
    space = workspace();
    vidfast::cuda::forward_grad(p, &out_grad, loss_dtype, grad.view, grad_alpha.data(), space.data(), nullptr);
    close("loss of forward_grad", get(&out_grad, loss_dtype, 0), got, 0);
    check_gradient("d/d mean", grad, 1, 1, 1);
    for (size_t c = 0; c < alpha.size(); ++c)
      close("d/d alpha", grad_alpha[c], d_alpha[c], relative * d_alpha_scale[c]);
    if (round == 0) {
      first_loss = static_cast<double>(got);
      first_sums = sum_sq;
    } else if (first_loss != static_cast<double>(got) || first_sums != sum_sq) {
      fail("the loss of another run", got, first_loss);
    }

    // scale: in place, by g = 1, which writes d/d alpha alone, and by another.
    for (const double g : {1.0, -2.5}) {
      const float g32 = static_cast<float>(g);
      const void* at = wide ? static_cast<const void*>(&g) : &g32;
      auto scaled_alpha = poisoned<float>(s.channels);
      vidfast::cuda::scale(at, loss_dtype, s.outer, s.channels * s.inner, grad.view, grad.view, s.channels,
                           grad_alpha.data(), scaled_alpha.data(), DType::f32, nullptr);
      check_gradient("scaled d/d mean", grad, g, 1, g == 1 ? 1 : 3);
      for (size_t c = 0; c < alpha.size(); ++c)
        close("scaled d/d alpha", scaled_alpha[c], static_cast<Real>(g) * static_cast<Real>(grad_alpha[c]),
              rounding(DType::f32, static_cast<Real>(g) * static_cast<Real>(grad_alpha[c])));
    }

    const float g = 3;
    Activation grad_mean(s, mean_dtype, true), grad_target(s, target_dtype, true);
    auto typed_alpha = poisoned<float>(s.channels);
    vidfast::cuda::backward(p, &g, DType::f32, sum_sq.data(), grad_mean.view, grad_target.view, typed_alpha.data(),
                            nullptr);
    check_gradient("d/d mean of backward", grad_mean, 3, 1, 1);
    check_gradient("d/d target", grad_target, 3, -1, 1);
    auto alone = poisoned<float>(s.channels);
    vidfast::cuda::backward(p, &g, DType::f32, sum_sq.data(), View{}, View{}, alone.data(), nullptr);
    for (size_t c = 0; c < alpha.size(); ++c) {
      close("d/d alpha of backward", typed_alpha[c], 3 * d_alpha[c],
            3 * relative * d_alpha_scale[c] + rounding(DType::f32, 3 * d_alpha[c]));
      close("d/d alpha alone", alone[c], typed_alpha[c], 0);
    }
  }

  // In place: mean is gone, what lies between its rows is not.
  Activation copy(s, mean_dtype, false);
  std::memcpy(copy.view.data, mean.view.data, static_cast<size_t>(mean.elements * vidfast::size_of(mean_dtype)));
  Problem over = p;
  over.mean = copy.view;
  double out = NAN;
  auto grad_alpha = poisoned<double>(s.channels);
  auto space = workspace();
  vidfast::cuda::forward_grad(over, &out, loss_dtype, copy.view, grad_alpha.data(), space.data(), nullptr);
  check_gradient("d/d mean in place", copy, 1, 1, 1);
  copy.gaps_untouched();
}

// Quotients by a multiplication, at the multiples of each divisor and beside them, up to 2^62.
void divisions() {
  const int64_t divisors[] = {1,
                              2,
                              3,
                              5,
                              7,
                              49,
                              64,
                              196,
                              255,
                              641,
                              1000,
                              65535,
                              65536,
                              6700417,
                              (int64_t{1} << 31) - 1,
                              (int64_t{1} << 31) + 1,
                              (int64_t{1} << 40) + 7};
  for (int64_t d : divisors) {
    const vidfast::cuda::Divisor by = vidfast::cuda::divisor(d);
    for (int bit = 0; bit < 62; ++bit)
      for (int64_t beside = -1; beside <= 1; ++beside) {
        const int64_t n = (int64_t{1} << bit) / d * d + beside;
        if (n < 0) continue;
        if (vidfast::cuda::quotient(n, by) != n / d) {
          ++failures;
          std::fprintf(stderr, "%ld / %ld is not %ld\n", long(n), long(d), long(vidfast::cuda::quotient(n, by)));
        }
      }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool all = argc < 2 || std::string(argv[1]) != "f32";
  const Shape shapes[] = {
      {"planes, whole vectors", 3, 5, 1024},
      {"planes with heads and tails", 2, 3, 1601},
      {"planes in pieces", 1, 2, 9001},
      {"planes of misaligned rows", 2, 3, 1030, 5, 1},
      {"planes, many rows in a chunk", 9, 2, 1100},
      {"one channel", 5, 1, 77},
      {"one channel, strided", 5, 1, 77, 3},
      {"7x7", 6, 24, 49},
      {"14x14 cut by tiles", 9, 21, 196},
      {"14x14 of a batch slice", 5, 8, 196, 1568},
      {"7x7 of a misaligned channel slice", 5, 5, 49, 98, 3},
      {"7x7, rows joined, one incomplete", 13, 3, 49},
      {"fewer rows than are joined", 3, 5, 1},
      {"channels last", 700, 64, 1},
      {"channels last, 257", 65, 257, 1},
      {"logits", 33, 1000, 1},
      {"one row", 1, 1000, 1},
      {"narrow rows, strided", 301, 6, 1, 2},
      {"many row chunks", 20011, 8, 1},
      {"many row chunks, small planes", 4000, 3, 9},
      {"planes of few vectors", 129, 3, 343},
      {"runs wider than a tile", 129, 3, 200},
      {"many channels in several chunks", 65, 520, 1},
      {"many channels, cut", 40, 300, 49},
      {"one element", 1, 1, 1},
  };
  const DType dtypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
  divisions();
  int runs = 0;
  try {
    for (const Shape& s : shapes)
      for (DType mean : dtypes)
        for (DType target : dtypes) {
          if (!all && (mean != DType::f32 || target != DType::f32)) continue;
          // every mixture on the small shapes, the four pure pairs on all
          if (mean != target && s.outer * s.channels * s.inner > 12000) continue;
          run(s, mean, target);
          ++runs;
        }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s: %s\n", where.c_str(), e.what());
    return 1;
  }
  std::printf("%d problems, %ld launches, %d failures\n", runs, emulation::machine().launches, failures);
  return failures == 0 ? 0 : 1;
}
