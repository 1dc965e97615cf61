// M and k of a call where they are known on the device alone: the sum of the positions' weights, in fp64.
//
// A block sums a piece. Up to kAtOnce positions are one piece, whose block finishes the two numbers; of more, the
// pieces' sums are stored, and are the positions of a second launch. Which thread adds a weight, and when, follows
// from its number alone, wherever it is stored. Traffic: the weights once.
#include <algorithm>
#include <sstream>

#include "reduce.h"

namespace vidfast::cuda {
namespace {

constexpr int64_t kAtOnce = 1 << 16;
constexpr int64_t kPiece = 1 << 13;
constexpr int64_t kMostPieces = 1 << 11;

struct TotalArgs {
  const void* positions;  // [count] or absent
  int64_t count, piece;
  double* sums;  // [pieces] what each block stores, or absent: it stores `totals`
  bool overlap;  // wait for the launch before
  const void* factor;
  DType factor_dtype;
  double k;
  int64_t channels;  // if not 0, k is divided by M times this
  double* totals;
};

std::string describe(const TotalArgs& a) {
  std::ostringstream out;
  out << "positions@" << a.positions << ", count=" << a.count << ", factor@" << a.factor << ", totals@" << a.totals;
  return out.str();
}

// A thread's sum: of numbers, one for each place in a vector; of bytes, an integer, which is exact.
template <class P>
struct Sums {
  static constexpr int W = 16 / sizeof(P);
  double s[W] = {};

  __device__ void add(P x, int e) { s[e] += static_cast<double>(x); }
  __device__ void add(const uint4& word) {
    P x[W];
    memcpy(x, &word, sizeof(word));
#pragma unroll
    for (int e = 0; e < W; ++e) add(x[e], e);
  }
  __device__ double value() const {
    double sum = s[0];
#pragma unroll
    for (int e = 1; e < W; ++e) sum += s[e];
    return sum;
  }
};
template <>
struct Sums<uint8_t> {
  static constexpr int W = 16;
  uint64_t s = 0;

  __device__ void add(uint8_t x, int) { s += x; }
  __device__ void add(const uint4& word) {
    unsigned pairs = 0;  // two sums of 16 bits
    for (const unsigned x : {word.x, word.y, word.z, word.w}) pairs += (x & 0x00ff00ffu) + (x >> 8 & 0x00ff00ffu);
    s += (pairs & 0xffffu) + (pairs >> 16);
  }
  __device__ double value() const { return static_cast<double>(s); }
};

template <class P>
__device__ double sum_of_piece(const P* from, int64_t n) {
  constexpr int W = Sums<P>::W;
  constexpr int U = 8;  // vectors in flight
  Sums<P> sums;
  const int64_t vectors = n / W;
  if (aligned<P>(from)) {
    for (int64_t first = threadIdx.x; first < vectors; first += kThreads * U) {
      uint4 word[U];
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (first + kThreads * u < vectors) word[u] = reinterpret_cast<const uint4*>(from)[first + kThreads * u];
#pragma unroll
      for (int u = 0; u < U; ++u)
        if (first + kThreads * u < vectors) sums.add(word[u]);
    }
  } else {
    for (int64_t v = threadIdx.x; v < vectors; v += kThreads)
#pragma unroll
      for (int e = 0; e < W; ++e) sums.add(from[v * W + e], e);
  }
  const int tail = static_cast<int>(n - vectors * W);
  if (static_cast<int>(threadIdx.x) < tail) sums.add(from[vectors * W + threadIdx.x], 0);
  return sums.value();
}

template <class P>
__global__ void __launch_bounds__(kThreads) total_of(const __grid_constant__ TotalArgs a) {
  double* scratch = reinterpret_cast<double*>(shared_memory());
  if (a.overlap)
    wait_for_previous();
  else
    let_next_start();
  const Raw factor = a.factor == nullptr ? Raw() : Raw(a.factor, a.factor_dtype, 0);
  double m = 0;
  if (a.positions != nullptr) {
    const int64_t begin = blockIdx.x * a.piece;
    const int64_t n = begin + a.piece < a.count ? a.piece : a.count - begin;
    m = block_sum(scratch, sum_of_piece(static_cast<const P*>(a.positions) + begin, n));
  } else {
    m = static_cast<double>(a.count);
  }
  if (threadIdx.x > 0) return;
  if (a.sums != nullptr) {
    a.sums[blockIdx.x] = m;
    return;
  }
  double k = a.factor == nullptr ? a.k : a.k * factor.value();
  if (a.channels != 0) k /= m * static_cast<double>(a.channels);
  if (m == 0) k = 0;  // whatever the factor is: one over nothing, say
  a.totals[0] = m;
  a.totals[1] = k;
}

template <class P>
void launch_total(const TotalArgs& a, int64_t blocks, cudaStream_t stream) {
  launch("total", &total_of<P>, blocks, kWarps * sizeof(double), stream, a, a.overlap);
}

// A whole number of vectors of every kind for each thread.
int64_t piece_of(int64_t count) {
  return std::max(kPiece, (count + kMostPieces * kPiece - 1) / (kMostPieces * kPiece) * kPiece);
}
int64_t pieces_of(int64_t count) { return count <= kAtOnce ? 1 : (count + piece_of(count) - 1) / piece_of(count); }

}  // namespace

int64_t total_workspace_bytes(int64_t count) {
  const int64_t pieces = pieces_of(count);
  return pieces == 1 ? 0 : pieces * static_cast<int64_t>(sizeof(double));
}

void total(const Total& t, double* totals, void* workspace, Stream stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  TotalArgs a{};
  a.positions = t.positions;
  a.count = t.count;
  a.piece = t.count;
  a.factor = t.factor;
  a.factor_dtype = t.factor_dtype;
  a.k = t.k;
  a.channels = t.channels;
  a.totals = totals;
  const int64_t pieces = t.positions == nullptr ? 1 : pieces_of(t.count);
  if (pieces > 1) {
    a.piece = piece_of(t.count);
    a.sums = static_cast<double*>(workspace);
  }
  if (t.positions_are_bytes)
    launch_total<uint8_t>(a, pieces, on);
  else if (t.positions_are_f64)
    launch_total<double>(a, pieces, on);
  else
    launch_total<float>(a, pieces, on);
  if (pieces == 1) return;
  a.positions = a.sums;
  a.count = a.piece = pieces;
  a.sums = nullptr;
  a.overlap = can_overlap();
  launch_total<double>(a, 1, on);
}

}  // namespace vidfast::cuda
