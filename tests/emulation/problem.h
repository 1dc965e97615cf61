// What the checks of check.cpp are made of: problems in memory of exactly their size, and comparisons.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/half.h"
#include "gaussian_nll.h"

using vidfast::DType;
using vidfast::View;
using Real = long double;

inline int failures = 0;
inline std::string where;

inline void fail(const std::string& what, Real got, Real want) {
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

inline Real get(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::f64: return static_cast<const double*>(p)[i];
    case DType::bf16: return vidfast::cpu::to_float(static_cast<const vidfast::cpu::bf16*>(p)[i]);
    case DType::f16: return vidfast::cpu::to_float(static_cast<const vidfast::cpu::f16*>(p)[i]);
  }
  return 0;
}

inline void put(void* p, DType t, int64_t i, double x) {
  switch (t) {
    case DType::f32: static_cast<float*>(p)[i] = static_cast<float>(x); break;
    case DType::f64: static_cast<double*>(p)[i] = x; break;
    case DType::bf16: static_cast<vidfast::cpu::bf16*>(p)[i] = vidfast::cpu::to_bf16(static_cast<float>(x)); break;
    case DType::f16: static_cast<vidfast::cpu::f16*>(p)[i] = vidfast::cpu::to_f16(static_cast<float>(x)); break;
  }
}

// What a rounding at x may add: about a unit in the last place (half of one in 16 bits), and the subnormal range.
inline Real rounding(DType t, Real x) {
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
  int64_t gap = 0;       // elements between rows that are not the problem's
  int64_t offset = 0;    // elements before the first
  int64_t blocks = 256;  // of rows wanted (kBlocks): of few a thread has many rows
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
  if (n > 0) std::memset(v.data(), 0xff, v.size() * sizeof(T));
  return v;
}

inline void close(const std::string& what, Real got, Real want, Real allowed) {
  if (!(std::fabs(got - want) <= allowed)) fail(what, got, want);
}

// Weights of positions. Each kind of number has whole tiles that do not count, and tiles of which some do.
enum class Mask { none, bytes, numbers, nothing };

struct Positions {
  const int64_t outer, inner;
  std::vector<Real> weight;  // [outer * inner]
  std::unique_ptr<unsigned char[]> memory;
  const void* data = nullptr;
  Real sum = 0;

  Positions(const Shape& s, Mask mask, bool wide, Random& random) : outer(s.outer), inner(s.inner) {
    const int64_t count = outer * inner;
    const int64_t size = mask == Mask::numbers ? (wide ? 8 : 4) : 1;
    const int64_t offset = s.offset * size;  // as misaligned as the activations
    memory.reset(new unsigned char[static_cast<size_t>(offset + count * size)]);
    unsigned char* at = memory.get() + offset;
    if (mask != Mask::none) data = at;
    for (int64_t p = 0; p < count; ++p) {
      const bool tile_counts = 3 * p < count || 3 * p >= 2 * count;
      double w = tile_counts && random() > -1 ? 1 : 0;
      if (mask == Mask::none) w = 1;
      if (mask == Mask::nothing) w = 0;
      if (mask == Mask::numbers) {
        w = static_cast<float>(w * (2 + random()));
        put(at, wide ? DType::f64 : DType::f32, p, w);
      } else {
        at[p] = static_cast<unsigned char>(w);
      }
      weight.push_back(w);
      sum += weight.back();
    }
  }
  // Of element j of row o.
  Real of(int64_t o, int64_t j) const { return weight[static_cast<size_t>(o * inner + j % inner)]; }
  // What does not count is no number.
  void poison(Activation& x) const {
    for (int64_t o = 0; o < outer; ++o)
      for (int64_t j = 0; j < x.row; ++j)
        if (of(o, j) == 0) put(x.view.data, x.dtype, o * x.stride + j, j % 2 == 0 ? NAN : INFINITY);
  }
};
