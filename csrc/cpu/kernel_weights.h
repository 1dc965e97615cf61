// What the tile kernels do with the weights of positions, over the vectors of whichever simd_*.h was included before.
// Everything is in an unnamed namespace: each instruction set's translation unit keeps its own copy.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "weight_blocks.h"

namespace vidfast::cpu {
namespace {

constexpr int64_t kLine = 64;

// The type of weights that are 1 everywhere, of which nothing is loaded.
struct Ones {};
template <class P>
constexpr bool kWeighted = !std::is_same_v<P, Ones>;

inline bool all_zero(const void* p, int64_t bytes) {
  const char* at = static_cast<const char*>(p);
  for (; bytes >= 32; at += 32, bytes -= 32)
    if (bits_of<32>(at) != 0) return false;
  for (; bytes > 0; ++at, --bytes)
    if (*at != 0) return false;
  return true;
}

template <class V, class P>
inline void put(P* p, typename V::reg a, bool stream) {
  if (stream)
    V::stream(p, a);
  else
    V::store(p, a);
}

// Zeros into some vectors of a gradient.
template <class V, int N, class P>
inline void clear_vectors(P* p, bool stream) {
  for (int i = 0; i < N; ++i) put<V>(p + i * V::W, V::set1(0), stream);
}

// Zeros into a gradient that is there; `stream`: past the caches, in whole lines.
template <class V, class P>
inline void clear(P* p, int64_t n, bool stream) {
  if (p == nullptr) return;
  int64_t i = 0;
  if (stream) {
    for (; i < n && reinterpret_cast<uintptr_t>(p + i) % kLine != 0; ++i) V::put(p + i, 0);
    for (; n - i >= V::W; i += V::W) V::stream(p + i, V::set1(0));
  }
  std::memset(static_cast<void*>(p + i), 0, (n - i) * sizeof(P));
}

template <class P>
const P* row_of(const Tile& job, int64_t row) {
  return static_cast<const P*>(job.weights) + row * job.row_positions;
}

// The weight that all columns of a row have, which is of one position.
template <class S>
inline S row_weight(const Tile& job, int64_t row) {
  return job.weights_are_bytes ? S(*row_of<uint8_t>(job, row)) : *row_of<S>(job, row);
}

// Of a run, what is read some steps later. Weights take so many instructions that fewer loads are under way at once.
template <int64_t Step, class P>
inline void prefetch_ahead(const P* p) {
  constexpr int64_t kAhead = 1024, kBytes = Step * static_cast<int64_t>(sizeof(P));
  for (int64_t at = 0; at < kBytes; at += kLine) __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + at);
}

// to[j] = the weight of column j; up to a vector more is written over.
template <class V, class P>
inline void spread(const Tile& job, const P* weights, typename V::Scalar* to) {
  const int64_t inner = job.inner, width = job.channels * inner;
  const P* from = weights + job.first / width * inner;
  int64_t skipped = job.first % width;  // of the first position's row; the others are whole
  for (int64_t j = 0; j < job.columns; from += inner, skipped = 0) {
    const int64_t n = std::min(job.columns - j, width - skipped);
    if (inner == 1) {
      for (int64_t i = 0; i < n; i += V::W) V::store(to + j + i, V::set1(V::get(from)));
    } else {
      const int64_t once = std::min(n, inner);
      for (int64_t i = 0, at = skipped % inner; i < once; ++i, at = at + 1 == inner ? 0 : at + 1)
        to[j + i] = V::get(from + at);
      for (int64_t there = once; there < n; there *= 2) std::copy_n(to + j, std::min(there, n - there), to + j + there);
    }
    j += n;
  }
}

// Likewise of one row; false, and nothing written, where all its positions weigh 0.
template <class V>
inline bool spread_row(const Tile& job, int64_t row, typename V::Scalar* to) {
  using S = typename V::Scalar;
  const int64_t n = job.row_positions;
  if (job.weights_are_bytes) {
    if (all_zero(row_of<uint8_t>(job, row), n)) return false;
    spread<V>(job, row_of<uint8_t>(job, row), to);
  } else {
    if (all_zero(row_of<S>(job, row), n * static_cast<int64_t>(sizeof(S)))) return false;
    spread<V>(job, row_of<S>(job, row), to);
  }
  return true;
}

}  // namespace
}  // namespace vidfast::cpu
