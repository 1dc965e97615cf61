// All CUDA primitives on the host against equation 5 in long double, without Python: the program that runs under
// AddressSanitizer and UBSan, and that must fail when a kernel is broken on purpose.
//
//   check [all]     every pair of dtypes (the default), or f32 alone with `check f32`
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "emulation.h"
#include "gaussian_nll.h"
#include "problem.h"

using vidfast::Problem;

namespace {

void run(const Shape& s, DType mean_dtype, DType target_dtype, Mask mask) {
  const bool wide = mean_dtype == DType::f64 || target_dtype == DType::f64;
  const DType loss_dtype = wide ? DType::f64 : DType::f32;
  const char* names[] = {"f32", "f64", "bf16", "f16"};
  const char* masks[] = {"", ", bytes", ", numbers", ", nothing counts"};
  where = std::string(s.why) + " " + names[static_cast<int>(mean_dtype)] + "/" + names[static_cast<int>(target_dtype)] +
          masks[static_cast<int>(mask)];

  vidfast::cuda::kBlocks = s.blocks;
  Random random;
  Activation mean(s, mean_dtype, false), target(s, target_dtype, false);
  mean.fill(random);
  target.fill(random);
  std::vector<float> alpha(static_cast<size_t>(s.channels));
  for (float& x : alpha) x = static_cast<float>(2 * random());
  const double eps = 1e-5, host_k = 1 / static_cast<double>(s.outer * s.channels * s.inner);
  Problem p{s.outer, s.channels, s.inner, mean.view, target.view, alpha.data(), DType::f32, eps, host_k, true};

  const Positions positions(s, mask, wide, random);
  positions.poison(mean);
  positions.poison(target);
  const Real m = positions.sum, n = m * static_cast<Real>(s.channels);
  double totals[2] = {NAN, NAN};
  if (mask != Mask::none) {
    auto space = poisoned<uint64_t>(vidfast::cuda::total_workspace_bytes(s.outer * s.inner) / 8);
    const vidfast::Total total{positions.data,
                               mask != Mask::numbers,
                               wide,
                               s.outer * s.inner,
                               nullptr,
                               DType::f32,
                               1 / static_cast<double>(s.channels),
                               true};
    vidfast::cuda::total(total, totals, space.data(), nullptr);
    close("M", totals[0], m, 1e-15L * m);
    close("k", totals[1], m == 0 ? 0 : 1 / n, m == 0 ? 0 : 1e-15L / n);
    p.positions = positions.data;
    p.positions_are_bytes = mask != Mask::numbers;
    p.totals = totals;
    p.k = NAN;
  }
  const Real k = mask == Mask::none ? static_cast<Real>(host_k) : static_cast<Real>(totals[1]);

  // Equation 5.
  std::vector<Real> sum(alpha.size(), 0), v(alpha.size());
  for (int64_t c = 0; c < s.channels; ++c) {
    const Real a = alpha[static_cast<size_t>(c)];
    v[static_cast<size_t>(c)] = (a > 0 ? a : 0) + std::log1p(std::exp(-std::fabs(a))) + static_cast<Real>(eps);
  }
  for (int64_t o = 0; o < s.outer; ++o)
    for (int64_t j = 0; j < s.channels * s.inner; ++j) {
      if (positions.of(o, j) == 0) continue;
      const Real r = mean.at(o, j) - target.at(o, j);
      sum[static_cast<size_t>(j / s.inner)] += positions.of(o, j) * r * r;
    }
  Real loss = 0.5L * n * std::log(2 * 3.14159265358979323846264338327950288L), loss_scale = loss;
  std::vector<Real> d_alpha(alpha.size()), d_alpha_scale(alpha.size());
  for (size_t c = 0; c < alpha.size(); ++c) {
    loss += m / 2 * std::log(v[c]) + sum[c] / (2 * v[c]);
    loss_scale += m / 2 * std::fabs(std::log(v[c])) + sum[c] / (2 * v[c]);
    const Real sigmoid = 1 / (1 + std::exp(-static_cast<Real>(alpha[c])));
    d_alpha[c] = k * (m / (2 * v[c]) - sum[c] / (2 * v[c] * v[c])) * sigmoid;
    d_alpha_scale[c] = k * (m / (2 * v[c]) + sum[c] / (2 * v[c] * v[c])) * sigmoid;
  }
  loss *= k;
  loss_scale *= k;
  const Real relative = wide ? 1e-13L : 1e-6L;

  const int64_t bytes = vidfast::cuda::workspace_bytes(s.outer, s.channels, s.inner, mean.view.outer_stride,
                                                       target.view.outer_stride, mean_dtype, target_dtype);
  const auto workspace = [&] { return poisoned<uint64_t>((bytes + 7) / 8); };
  const auto check_gradient = [&](const char* what, const Activation& grad, Real g, Real sign, int roundings) {
    for (int64_t o = 0; o < s.outer; ++o)
      for (int64_t j = 0; j < s.channels * s.inner; ++j) {
        const Real w = positions.of(o, j), r = w == 0 ? 0 : mean.at(o, j) - target.at(o, j);
        const Real want = sign * g * k * w * r / v[static_cast<size_t>(j / s.inner)];
        close(what, grad.at(o, j), want,
              w == 0 ? 0 : roundings * rounding(grad.dtype, want) + std::fabs(want) * (wide ? 1e-15L : 3e-7L));
      }
  };

  // Twice, on another machine and in another order: the bits must be the same. Masked, in fp32 alone.
  std::vector<double> first_sums;
  double first_loss = 0;
  const int rounds = mask == Mask::none || (mean_dtype == DType::f32 && !wide) ? 2 : 1;
  for (int round = 0; round < rounds; ++round) {
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
    // the same order, but where gradients are aligned otherwise than what they are of
    close("loss of forward_grad", get(&out_grad, loss_dtype, 0), got, s.offset > 0 ? 1e-15L * loss_scale : 0);
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

// M and k: in one launch and in two, of weights at any address, the same whenever they are added.
void totals() {
  Random random;
  for (const int64_t count : {1, 255, 1000, 65536, 65537, 300001}) {
    for (int kind = 0; kind < 3; ++kind) {  // bytes, fp32, fp64
      const int64_t size = kind == 0 ? 1 : 4 * kind;
      where = "total of " + std::to_string(count) + (kind == 0 ? " bytes" : kind == 1 ? " f32" : " f64");
      std::vector<double> weight;
      for (int64_t i = 0; i < count; ++i)
        weight.push_back(kind == 0 ? double(i % 5 == 0 ? 255 : i % 3) : kind == 1 ? float(2 + random()) : 2 + random());
      Real m = 0;
      for (double w : weight) m += w;
      double first = NAN;
      for (int shift = 0; shift < 3; ++shift) {
        std::unique_ptr<unsigned char[]> memory(new unsigned char[static_cast<size_t>((shift + count) * size)]);
        unsigned char* at = memory.get() + shift * size;
        for (int64_t i = 0; i < count; ++i) {
          if (kind == 0)
            at[i] = static_cast<unsigned char>(weight[static_cast<size_t>(i)]);
          else
            put(at, kind == 1 ? DType::f32 : DType::f64, i, weight[static_cast<size_t>(i)]);
        }
        for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
          emulation::machine().seed += 1;
          double factor = NAN, out[2] = {NAN, NAN};
          put(&factor, dtype, 0, -1.5);
          const int64_t channels = dtype == DType::f16 ? 0 : 7;
          auto space = poisoned<uint64_t>(vidfast::cuda::total_workspace_bytes(count) / 8);
          vidfast::cuda::total({at, kind == 0, kind == 2, count, &factor, dtype, 3, channels}, out, space.data(),
                               nullptr);
          close("M", out[0], m, kind == 0 ? 0 : 1e-15L * m);
          close("k", out[1], -4.5 / (channels != 0 ? 7 * out[0] : 1), 1e-15L);
          if (first != first) first = out[0];
          close("M again", out[0], first, 0);
        }
      }
    }
  }
  where = "total";
  const unsigned char zeros[40] = {};
  double out[2];
  vidfast::cuda::total({zeros, true, false, 40, nullptr, DType::f32, 3, true}, out, nullptr, nullptr);
  close("M of nothing", out[0], 0, 0);
  close("k of nothing", out[1], 0, 0);
  const float nan = NAN;
  vidfast::cuda::total({&nan, false, false, 1, nullptr, DType::f32, 3, true}, out, nullptr, nullptr);
  if (out[0] == out[0] || out[1] == out[1]) fail("k of NaN", out[1], NAN);
  vidfast::cuda::total({nullptr, false, false, 40, nullptr, DType::f32, 3, true}, out, nullptr, nullptr);
  close("M without weights", out[0], 40, 0);
  close("k without weights", out[1], 3.0 / 40, 0);
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
      {"planes, two samples in a chunk", 5, 3, 256},
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
      {"many rows a thread", 100, 64, 1, 0, 0, 1},
      {"many rows a thread, small planes", 300, 3, 9, 0, 0, 1},
      {"planes of few vectors", 129, 3, 343},
      {"runs wider than a tile", 129, 3, 200},
      {"many channels in several chunks", 65, 520, 1},
      {"many channels, cut", 40, 300, 49},
      {"one element", 1, 1, 1},
  };
  const DType dtypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
  divisions();
  totals();
  int runs = 0;
  try {  // the first problem with a wrong result is the last
    for (const Shape& s : shapes)
      for (DType mean : dtypes)
        for (DType target : dtypes) {
          if (!all && (mean != DType::f32 || target != DType::f32)) continue;
          // every mixture on the small shapes, the four pure pairs on all
          if (mean != target && s.outer * s.channels * s.inner > 12000) continue;
          for (Mask mask : {Mask::none, Mask::bytes, Mask::numbers, Mask::nothing}) {
            // one kind of weights a shape in a mixture, and nothing that counts in fp32 alone
            const Mask other = (&s - shapes) % 2 == 0 ? Mask::bytes : Mask::numbers;
            if (failures > 0 || (mean != target && mask == other)) continue;
            if (mask == Mask::nothing && (mean != target || mean != DType::f32)) continue;
            run(s, mean, target, mask);
            ++runs;
          }
        }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s: %s\n", where.c_str(), e.what());
    return 1;
  }
  std::printf("%d problems, %ld launches, %d failures\n", runs, emulation::machine().launches, failures);
  return failures == 0 ? 0 : 1;
}
