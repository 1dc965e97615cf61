// The one product of a head's kernel: sums[r][n] = sum_k a[r][k] b[k][n] for a few rows r and up to three vectors of
// columns n, the rows' words broadcast, the sums in registers. Forward and back the rows are positions and b a weight's
// panel; for a weight's gradient k runs over the positions.
#pragma once

#include <type_traits>

#include "head_kernels.h"

// Loops over sums are unrolled whole: an index that is not constant would put them in memory.
#if defined(__clang__)
#define VIDFAST_UNROLL _Pragma("clang loop unroll(full)")
#else
#define VIDFAST_UNROLL _Pragma("GCC unroll 8")
#endif

namespace vidfast::cpu {
namespace {

using Reg = VF::reg;
constexpr int kMostVectors = 3;
constexpr int64_t kMostColumns = kMostVectors * VF::W;
int64_t whole_groups(int64_t rows) { return round_up(rows, kGroup); }
static_assert(kGroup % 2 == 0 && kHeadTile % kGroup == 0 && kHeadBlock % kGroup == 0 && kHeadPad % VF::W == 0,
              "no remainders");

// Columns are shared evenly among the fewest panels of up to kMostVectors vectors.
int64_t panels(int64_t columns) { return (columns / VF::W + kMostVectors - 1) / kMostVectors; }
int64_t panel_begin(int64_t columns, int64_t panel) { return columns / VF::W * panel / panels(columns) * VF::W; }

// f(a panel's number of vectors, as a type).
template <class F>
inline void with_vectors(int64_t columns, int64_t panel, const F& f) {
  switch ((panel_begin(columns, panel + 1) - panel_begin(columns, panel)) / VF::W) {
    case 1: f(std::integral_constant<int, 1>()); break;
    case 2: f(std::integral_constant<int, 2>()); break;
    default: f(std::integral_constant<int, kMostVectors>()); break;
  }
}

template <int N>
struct Sums {
  Reg at[kGroup][N];
};

template <int N>
inline void clear(Sums<N>& sums) {
  VIDFAST_UNROLL
  for (int r = 0; r < kGroup; ++r) {
    VIDFAST_UNROLL
    for (int n = 0; n < N; ++n) sums.at[r][n] = VF::set1(0);
  }
}

template <class Words, int N>
inline void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t depth,
                     Sums<N>& result) {
  Sums<N> sums = result;  // a copy, which no store can be to
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    Reg columns[N];
    VIDFAST_UNROLL
    for (int n = 0; n < N; ++n) columns[n] = VF::load(b + n * VF::W);
    VIDFAST_UNROLL
    for (int r = 0; r < kGroup; ++r) {
      const Reg row = VF::set1(a[r * a_row]);
      VIDFAST_UNROLL
      for (int n = 0; n < N; ++n) sums.at[r][n] = Words::multiply_add(row, columns[n], sums.at[r][n]);
    }
  }
  result = sums;
}

template <class Words, int N>
__attribute__((noinline)) void multiply_apart(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                              int64_t b_step, int64_t depth, Sums<N>& result) {
  multiply<Words, N>(a, a_row, a_step, b, b_step, depth, result);
}

}  // namespace
}  // namespace vidfast::cpu
