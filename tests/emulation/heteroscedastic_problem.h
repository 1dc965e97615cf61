// What the checks of check_heteroscedastic.cpp are made of: rows of neighbours, and what is right of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "heteroscedastic.h"
#include "problem.h"

using vidfast::HeteroscedasticProblem;
using vidfast::Transform;

constexpr Real kLog2Pi = 1.8378770664093454835606594728112L;

struct Case {
  const char* why;
  int64_t outer, row;
  int64_t gap = 0;          // elements between rows of mean and raw; the target has none
  int64_t offset = 0;       // elements before the first of each
  bool target_too = false;  // the target has those gaps as well
  int64_t channels = 1, inner = 1;
  int64_t blocks = 1024;  // wanted: of few a thread takes several batches

  int64_t count() const { return outer * row; }
  int64_t position(int64_t e) const { return e / (channels * inner) * inner + e % inner; }
};

struct Setting {
  Transform transform;
  double beta = 0;
  bool full = false;
  bool negative_is_nan = false;
};

// One element's numbers, of the stored values.
struct Want {
  Real log_v, inverse, slope, power;
};

inline Want want_of(const Setting& s, Real u, Real eps) {
  Want w{};
  const Real sigmoid = 1 / (1 + std::exp(-u));
  Real v = 0;
  switch (s.transform) {
    case Transform::softplus:
      v = (u > 0 ? u : 0) + std::log1p(std::exp(-std::fabs(u))) + eps;
      w.slope = sigmoid / v;
      break;
    case Transform::exp:
      v = std::exp(u) + eps;
      w.slope = std::exp(u) / v;
      break;
    case Transform::log_variance:
      v = std::exp(u);
      w.slope = 1;
      break;
    case Transform::clamp:
      v = u < 0 && s.negative_is_nan ? NAN : u < eps ? eps : u;
      w.slope = 1 / v;
      break;
  }
  w.log_v = std::log(v);
  w.inverse = 1 / v;
  w.power = std::pow(v, static_cast<Real>(s.beta));
  return w;
}

struct Tensors {
  Activation mean, target, raw;

  Tensors(const Case& c, DType mean_dtype, DType target_dtype, DType raw_dtype)
      : mean(shape(c), mean_dtype, false),
        target(Shape{c.why, c.outer, 1, c.row, c.target_too ? c.gap : 0, c.offset}, target_dtype, false),
        raw(shape(c), raw_dtype, false) {}
  static Shape shape(const Case& c) { return {c.why, c.outer, 1, c.row, c.gap, c.offset}; }
};

inline Real at(const Activation& x, int64_t e) { return x.at(e / x.row, e % x.row); }

inline void copy(const Activation& from, Activation& to) {
  for (int64_t o = 0; o < from.outer; ++o)
    std::memcpy(static_cast<unsigned char*>(to.view.data) + o * to.stride * vidfast::size_of(to.dtype),
                static_cast<unsigned char*>(from.view.data) + o * from.stride * vidfast::size_of(from.dtype),
                static_cast<size_t>(from.row * vidfast::size_of(from.dtype)));
}

struct Problem {
  const Case& c;
  const Setting& s;
  Mask mask;
  bool wide;
  DType loss_dtype;
  double eps = 1e-3, k;
  double totals[2] = {NAN, NAN};
  Positions positions;
  HeteroscedasticProblem p;

  Problem(const Case& c_, const Setting& s_, Mask mask_, const Tensors& x, Random& random)
      : c(c_),
        s(s_),
        mask(mask_),
        wide(x.mean.dtype == DType::f64 || x.target.dtype == DType::f64 || x.raw.dtype == DType::f64),
        loss_dtype(wide ? DType::f64 : DType::f32),
        k(1 / static_cast<double>(c_.count())),
        positions(Shape{c_.why, c_.count() / (c_.channels * c_.inner), c_.channels, c_.inner, 0, c_.offset}, mask_,
                  wide, random),
        p{} {
    p.outer = c.outer;
    p.row = c.row;
    p.mean = x.mean.view;
    p.target = x.target.view;
    p.raw = x.raw.view;
    p.transform = s.transform;
    p.eps = s.transform == Transform::log_variance ? 0 : eps;
    p.beta = s.beta;
    p.k = k;
    p.full = s.full;
    p.negative_is_nan = s.negative_is_nan;
    if (mask == Mask::none) return;
    p.channels = c.channels;
    p.inner = c.inner;
    p.positions = positions.data;
    p.positions_are_bytes = mask != Mask::numbers;
    totals[0] = static_cast<double>(positions.sum);
    totals[1] = k = k / 2;
    p.totals = totals;
    p.k = NAN;
  }
  Problem(const Problem&) = delete;

  Real weight(int64_t e) const { return positions.weight[static_cast<size_t>(c.position(e))]; }
  std::vector<uint64_t> workspace() const {
    return poisoned<uint64_t>(
        vidfast::cuda::heteroscedastic_workspace_bytes(c.outer, c.row, p.mean.dtype, p.target.dtype, p.raw.dtype) / 8);
  }
};

// What is right, from the values of `x` at the start.
struct Truth {
  std::vector<Real> mean, raw, raw_scale;  // for an incoming gradient of 1
  std::vector<Real> loose;                 // what an error of log v does to v^beta, relative
  Real loss = 0, scale = 0;

  Truth(const Problem& problem, const Tensors& x) {
    const Setting& s = problem.s;
    for (int64_t e = 0; e < problem.c.count(); ++e) {
      const Real w = problem.weight(e);
      if (w == 0) {
        for (std::vector<Real>* v : {&mean, &raw, &raw_scale, &loose}) v->push_back(0);
        continue;
      }
      const Real r = at(x.mean, e) - at(x.target, e), u = at(x.raw, e);
      const Want want = want_of(s, u, static_cast<Real>(problem.p.eps));
      const Real f = static_cast<Real>(problem.k) * w * want.power, rq = r * r * want.inverse;
      mean.push_back(f * r * want.inverse);
      raw.push_back(f / 2 * (1 - rq) * want.slope);
      raw_scale.push_back(f / 2 * (1 + rq) * want.slope);
      loose.push_back(1 + static_cast<Real>(s.beta) * std::fabs(want.log_v));
      const Real constant = s.full ? kLog2Pi : 0;
      loss += f / 2 * (want.log_v + rq + constant);
      scale += f / 2 * (std::fabs(want.log_v) + rq + constant + 1) * loose.back();
    }
  }
};
