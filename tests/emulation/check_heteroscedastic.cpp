// The CUDA primitives of the loss with one variance an element, on the host, against csrc/heteroscedastic.h's formulas
// in long double: as check.cpp, run under the sanitizers, and broken on purpose.
//
//   check_heteroscedastic [all]     every triple of dtypes (the default), or f32 alone with `check_heteroscedastic f32`
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/heteroscedastic_args.h"
#include "emulation.h"
#include "heteroscedastic.h"
#include "heteroscedastic_problem.h"

namespace {

void check_gradient(const char* what, const Activation& got, const Problem& problem, const std::vector<Real>& want,
                    const std::vector<Real>& scale, const std::vector<Real>& loose, Real g) {
  const Real relative = problem.wide ? 1e-14L : 1e-6L;
  for (int64_t e = 0; e < problem.c.count(); ++e) {
    const size_t i = static_cast<size_t>(e);
    const bool counts = problem.weight(e) != 0;
    const Real allowed =
        rounding(got.dtype, g * want[i]) + relative * loose[i] * std::fabs(g * scale[i]) + (problem.wide ? 0 : 1e-42L);
    if (want[i] != want[i]) {
      if (at(got, e) == at(got, e)) fail(what, at(got, e), want[i]);
    } else {
      close(what, at(got, e), g * want[i], counts ? allowed : 0);
    }
  }
}

void run(const Case& c, DType mean_dtype, DType target_dtype, DType raw_dtype, const Setting& s, Mask mask) {
  const char* names[] = {"f32", "f64", "bf16", "f16"};
  const char* masks[] = {"", ", bytes", ", numbers", ", nothing counts"};
  where = std::string(c.why) + " " + names[static_cast<int>(mean_dtype)] + "/" + names[static_cast<int>(target_dtype)] +
          "/" + names[static_cast<int>(raw_dtype)] + ", transform " + std::to_string(static_cast<int>(s.transform)) +
          ", beta " + std::to_string(s.beta) + masks[static_cast<int>(mask)];
  vidfast::cuda::kBlocksWanted = c.blocks;
  Random random;
  Tensors x(c, mean_dtype, target_dtype, raw_dtype);
  for (Activation* tensor : {&x.mean, &x.target, &x.raw}) tensor->fill(random);
  for (int64_t e = 0; e < c.count(); ++e) {  // variances of very different sizes
    const double u = 4 * static_cast<double>(at(x.raw, e));
    put(x.raw.view.data, raw_dtype, e / c.row * x.raw.stride + e % c.row,
        s.transform == Transform::clamp && !s.negative_is_nan ? std::fabs(u) : u);
  }
  Problem problem(c, s, mask, x, random);
  for (int64_t e = 0; e < c.count(); ++e)
    if (problem.weight(e) == 0)
      for (Activation* tensor : {&x.mean, &x.target, &x.raw})
        put(tensor->view.data, tensor->dtype, e / c.row * tensor->stride + e % c.row, e % 2 == 0 ? NAN : INFINITY);
  const Truth truth(problem, x);
  const HeteroscedasticProblem& p = problem.p;
  const Real allowed = (problem.wide ? 1e-13L : 1e-6L) * truth.scale + rounding(problem.loss_dtype, truth.loss);
  const auto check_loss = [&](const char* what, const double& out) {
    const Real got = get(&out, problem.loss_dtype, 0);
    if (truth.loss != truth.loss) {
      if (got == got) fail(what, got, truth.loss);
    } else {
      close(what, got, truth.loss, allowed);
    }
  };
  const auto dense = [&](DType t) { return Activation({c.why, c.outer, 1, c.row}, t, true); };
  const auto check_mean = [&](const char* what, const Activation& grad, Real g) {
    check_gradient(what, grad, problem, truth.mean, truth.mean, truth.loose, g);
  };
  const auto check_raw = [&](const char* what, const Activation& grad, Real g) {
    check_gradient(what, grad, problem, truth.raw, truth.raw_scale, truth.loose, g);
  };

  // Twice, on another machine and in another order: the bits must be the same.
  double first = 0;
  for (int round = 0; round < 2; ++round) {
    emulation::machine().device = round;
    emulation::machine().processors = round == 0 ? 3 : 1;
    emulation::machine().resident = 2 + round;
    emulation::machine().seed += 1;
    double out = NAN, out_grad = NAN, out_one = NAN;
    auto space = problem.workspace();
    vidfast::cuda::heteroscedastic_forward(p, &out, problem.loss_dtype, space.data(), nullptr);
    check_loss("loss", out);
    Activation grad_mean = dense(mean_dtype), grad_raw = dense(raw_dtype), alone = dense(raw_dtype);
    space = problem.workspace();
    vidfast::cuda::heteroscedastic_forward_grad(p, &out_grad, problem.loss_dtype, grad_mean.view, grad_raw.view,
                                                space.data(), nullptr);
    check_mean("d/d mean", grad_mean, 1);
    check_raw("d/d raw", grad_raw, 1);
    space = problem.workspace();
    vidfast::cuda::heteroscedastic_forward_grad(p, &out_one, problem.loss_dtype, View{}, alone.view, space.data(),
                                                nullptr);
    check_raw("d/d raw alone", alone, 1);
    if (round == 0) first = out;
    for (const double* same : {&out, &out_grad, &out_one})
      if (std::memcmp(same, &first, problem.wide ? 8 : 4) != 0 && truth.loss == truth.loss)
        fail("the loss of another run", get(same, problem.loss_dtype, 0), get(&first, problem.loss_dtype, 0));
  }

  const float g = -3;
  Activation grad_mean = dense(mean_dtype), grad_target = dense(target_dtype), grad_raw = dense(raw_dtype);
  vidfast::cuda::heteroscedastic_backward(p, &g, DType::f32, grad_mean.view, grad_target.view, grad_raw.view, nullptr);
  check_mean("d/d mean of backward", grad_mean, -3);
  check_mean("d/d target", grad_target, 3);
  check_raw("d/d raw of backward", grad_raw, -3);
  Activation only = dense(target_dtype);
  vidfast::cuda::heteroscedastic_backward(p, &g, DType::f32, View{}, only.view, View{}, nullptr);
  check_mean("d/d target alone", only, 3);

  // In place: mean and raw are gone, what lies between their rows is not, and the loss has the same bits.
  Tensors over(c, mean_dtype, target_dtype, raw_dtype);
  copy(x.mean, over.mean);
  copy(x.raw, over.raw);
  HeteroscedasticProblem in_place = p;
  in_place.mean = over.mean.view;
  in_place.raw = over.raw.view;
  double out = NAN;
  auto space = problem.workspace();
  vidfast::cuda::heteroscedastic_forward_grad(in_place, &out, problem.loss_dtype, over.mean.view, over.raw.view,
                                              space.data(), nullptr);
  check_mean("d/d mean in place", over.mean, 1);
  check_raw("d/d raw in place", over.raw, 1);
  over.mean.gaps_untouched();
  over.raw.gaps_untouched();

  // Stored elsewhere, without gaps and aligned: other accesses, the same order of summation.
  const Case packed{c.why, c.outer, c.row, 0, 0, false, c.channels, c.inner, c.blocks};
  Tensors elsewhere(packed, mean_dtype, target_dtype, raw_dtype);
  copy(x.mean, elsewhere.mean);
  copy(x.target, elsewhere.target);
  copy(x.raw, elsewhere.raw);
  HeteroscedasticProblem other = p;
  other.mean = elsewhere.mean.view;
  other.target = elsewhere.target.view;
  other.raw = elsewhere.raw.view;
  vidfast::cuda::heteroscedastic_forward(other, &out, problem.loss_dtype, space.data(), nullptr);
  if (std::memcmp(&out, &first, problem.wide ? 8 : 4) != 0 && truth.loss == truth.loss)
    fail("the loss of the same values elsewhere", get(&out, problem.loss_dtype, 0), get(&first, problem.loss_dtype, 0));
}

// One element at the ends of the range: what is finite stays finite, and NaN goes on.
void extremes(bool all) {
  const double raws[] = {0,   -0.0, 1e-30, -1e-30, 17,   -17,      60,        -60, 88,
                         -80, 104,  -104,  1e4,    -1e4, INFINITY, -INFINITY, NAN};
  const Transform transforms[] = {Transform::softplus, Transform::exp, Transform::log_variance, Transform::clamp};
  for (const Transform transform : transforms)
    for (const DType dtype : {DType::f32, DType::f64})
      for (const double raw : raws) {
        if (dtype != DType::f32 && !all) continue;
        if (transform == Transform::log_variance && raw < -80) continue;  // r / v is itself out of range
        const Setting s{transform, 0, true, false};
        where = "raw " + std::to_string(raw) + ", transform " + std::to_string(static_cast<int>(transform)) +
                (dtype == DType::f32 ? " f32" : " f64");
        double mean = 0, target = 0, u = 0, loss = 0, grad_mean = 0, grad_raw = 0, space = 0;
        put(&mean, dtype, 0, 0.75);
        put(&target, dtype, 0, -0.5);
        put(&u, dtype, 0, raw);
        HeteroscedasticProblem p{};
        p.outer = p.row = 1;
        p.mean = {&mean, 1, dtype};
        p.target = {&target, 1, dtype};
        p.raw = {&u, 1, dtype};
        p.transform = transform;
        p.eps = transform == Transform::log_variance ? 0 : 1e-5;
        p.k = 1;
        p.full = true;
        vidfast::cuda::heteroscedastic_forward_grad(p, &loss, dtype, {&grad_mean, 1, dtype}, {&grad_raw, 1, dtype},
                                                    &space, nullptr);
        const Real got[] = {get(&loss, dtype, 0), get(&grad_mean, dtype, 0), get(&grad_raw, dtype, 0)};
        if (raw != raw) {
          for (const Real x : got)
            if (x == x) fail("of NaN", x, NAN);
          continue;
        }
        Want want = want_of(s, static_cast<Real>(raw), static_cast<Real>(p.eps));
        if (raw == INFINITY && transform == Transform::exp) want.slope = 1;
        const Real rq = 1.5625L * want.inverse;
        const Real wanted[] = {(want.log_v + rq + kLog2Pi) / 2, 1.25L * want.inverse, (1 - rq) * want.slope / 2};
        const Real scale[] = {std::fabs(want.log_v) + rq + 2, wanted[1], (1 + rq) * want.slope};
        const char* names[] = {"loss", "d/d mean", "d/d raw"};
        for (int i = 0; i < 3; ++i) {
          if (std::fabs(wanted[i]) > 1e300L && std::fabs(got[i]) == INFINITY) continue;  // of an infinite raw
          // exp(-|raw|) may be a subnormal number, or 0
          const Real underflow = 1e-44L * (1 + want.inverse) * (1 + rq);
          close(names[i], got[i], wanted[i], (dtype == DType::f32 ? 1e-6L : 1e-14L) * scale[i] + underflow);
        }
      }
}

// Where r is 0 a variance whose reciprocal is out of range costs no NaN.
void nothing_over_nearly_nothing() {
  for (const Transform transform : {Transform::log_variance, Transform::clamp}) {
    where = "a tiny variance, transform " + std::to_string(static_cast<int>(transform));
    const float mean = 0.5f, raw = transform == Transform::clamp ? 1e-42f : -120;
    float loss = 0, grad_mean = 1;
    double space = 0;
    HeteroscedasticProblem p{};
    p.outer = p.row = 1;
    p.mean = p.target = {const_cast<float*>(&mean), 1, DType::f32};
    p.raw = {const_cast<float*>(&raw), 1, DType::f32};
    p.transform = transform;
    p.eps = transform == Transform::clamp ? 1e-44 : 0;
    p.k = 2;
    vidfast::cuda::heteroscedastic_forward_grad(p, &loss, DType::f32, {&grad_mean, 1, DType::f32}, View{}, &space,
                                                nullptr);
    const Real log_v = transform == Transform::clamp ? std::log(static_cast<Real>(raw)) : static_cast<Real>(raw);
    close("loss", loss, log_v, 1e-6L * std::fabs(log_v));
    close("d/d mean", grad_mean, 0, 0);
  }
}

// An incoming gradient or a k that is no number reaches what counts, and nothing else.
void strange_factors() {
  where = "an infinite incoming gradient";
  float x[8] = {1, 2, 3, 4, 5, 6, 7, 8}, y[8] = {}, u[8] = {};
  unsigned char mask[8] = {1, 0, 1, 0, 0, 0, 0, 0};
  double totals[2] = {2, 1};
  float grad_mean[8], grad_raw[8], grad_target[8];
  HeteroscedasticProblem p{};
  p.outer = 1;
  p.row = 8;
  p.mean = {x, 8, DType::f32};
  p.target = {y, 8, DType::f32};
  p.raw = {u, 8, DType::f32};
  p.eps = 1e-5;
  p.positions = mask;
  p.positions_are_bytes = true;
  p.totals = totals;
  const double g = INFINITY;
  vidfast::cuda::heteroscedastic_backward(p, &g, DType::f64, {grad_mean, 8, DType::f32}, {grad_target, 8, DType::f32},
                                          {grad_raw, 8, DType::f32}, nullptr);
  for (int i = 0; i < 8; ++i)
    for (const float* grad : {grad_mean, grad_target, grad_raw})
      if ((grad[i] == 0) == (mask[i] != 0)) fail("a gradient", grad[i], mask[i] == 0 ? 0 : INFINITY);
}

}  // namespace

int main(int argc, char** argv) {
  const bool all = argc < 2 || std::string(argv[1]) != "f32";
  const Case cases[] = {
      {"one row of whole vectors", 1, 4096},
      {"one row with a tail", 1, 4099},
      {"one row, misaligned", 1, 2051, 0, 1},
      {"one element", 1, 1},
      {"less than a vector", 1, 3, 0, 2},
      {"several blocks", 1, 20011},
      {"rows joined", 7, 77},
      {"halves of whole vectors", 9, 64, 64},
      {"halves, all of them", 9, 64, 64, 0, true},
      {"halves of whole vectors, misaligned", 9, 64, 64, 3, true},
      {"halves of odd rows", 11, 77, 77},
      {"odd rows, gaps of whole vectors", 11, 77, 16},
      {"whole rows, odd gaps", 9, 64, 6},
      {"several batches", 1, 9999, 0, 0, false, 1, 1, 2},
      {"several batches of odd rows", 103, 97, 3, 0, false, 1, 1, 1},
      {"several batches of tokens", 1, 400 * 24, 0, 0, false, 24, 1, 1},
      {"rows of one", 301, 1, 1},
      {"rows of three", 119, 3, 3, 1},
      {"rows of seven, gaps in all", 83, 7, 2, 0, true},
      {"rows of eleven", 83, 11, 5},
      {"aligned rows of half a vector", 64, 2, 2},
      {"maps of channels", 1, 5 * 3 * 64, 0, 0, false, 3, 64},
      {"maps of channels between vectors", 1, 5 * 3 * 49, 0, 0, false, 3, 49},
      {"halves of channels", 5, 4 * 16, 64, 0, false, 4, 16},
      {"tokens", 1, 40 * 24, 0, 0, false, 24, 1},
      {"halves of tokens of odd width", 40, 21, 21, 0, false, 21, 1},
      {"halves of the last dimension of maps", 2 * 3 * 5, 4, 4, 0, false, 3, 20},
      {"channels of few elements", 1, 30 * 4 * 2, 0, 1, false, 4, 2},
  };
  const Setting settings[] = {
      {Transform::softplus},
      {Transform::exp},
      {Transform::log_variance},
      {Transform::clamp},
      {Transform::softplus, 0.5, true},
      {Transform::exp, 1},
      {Transform::log_variance, 0.7, true},
      {Transform::clamp, 1, true},
      {Transform::softplus, 0.7},
      {Transform::exp, 0.5, true},
      {Transform::log_variance, 1},
      {Transform::clamp, 0.5, false, true},
      {Transform::exp, 0.7},
      {Transform::clamp, 0.7},
      {Transform::softplus, 1, true},
  };
  constexpr int kSettings = sizeof(settings) / sizeof(settings[0]);
  struct Triple {
    DType mean, target, raw;
  };
  constexpr DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16, f16 = DType::f16;
  const Triple triples[] = {{f32, f32, f32},   {bf16, bf16, bf16}, {f16, f16, f16},   {f64, f64, f64},
                            {bf16, f32, bf16}, {f16, f32, f16},    {f32, bf16, f32},  {f32, f32, f16},
                            {bf16, f16, f32},  {f64, f32, f32},    {bf16, bf16, f64}, {f16, f64, f16}};
  int runs = 0, turn = 0;
  try {  // the first problem with a wrong result is the last
    extremes(all);
    nothing_over_nearly_nothing();
    strange_factors();
    for (const Case& c : cases)
      for (const Triple& t : triples) {
        const bool f32_alone = t.mean == f32 && t.target == f32 && t.raw == f32;
        if (!all && !f32_alone) continue;
        // every setting in fp32 alone; of the others three a case, so that all of them come
        for (int i = 0; i < (f32_alone ? kSettings : 3); ++i)
          for (Mask mask : {Mask::none, Mask::bytes, Mask::numbers, Mask::nothing}) {
            const Setting& s = settings[f32_alone ? i : turn % kSettings];
            if (mask == Mask::nothing && (i > 0 || !f32_alone)) continue;
            if (failures > 0 || (c.count() > 5000 && i > 0)) continue;
            // weights need not come in every setting
            if (mask != Mask::none && f32_alone && (i + static_cast<int>(mask) + (&c - cases)) % 3 != 0) continue;
            run(c, t.mean, t.target, t.raw, s, mask);
            ++runs;
            if (!f32_alone) ++turn;
          }
      }
  } catch (const std::exception& error) {  // a launch that the emulation refused
    std::fprintf(stderr, "%s: %s\n", where.c_str(), error.what());
    ++failures;
  }
  std::printf("%d problems, %d failures\n", runs, failures);
  return failures == 0 ? 0 : 1;
}
