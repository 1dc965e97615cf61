// What the kernels of the loss with one variance an element are launched with.
#pragma once

#include <string>

#include "../heteroscedastic.h"
#include "element.h"

namespace vidfast::cuda {

// A block takes up to kMostBatches batches of kThreads vectors, and fewer where there would not be so many blocks; in
// builds for a search or a check the second can be changed, as the numbers of chunks.h can.
constexpr int64_t kMostBatches = 16;
#ifdef VIDFAST_TUNE
inline int64_t kBlocksWanted = 1024;
#else
constexpr int64_t kBlocksWanted = 1024;
#endif

// Element e = o * row + j of a tensor is stored e + o * gap elements from its first.
struct Strided {
  unsigned char* data;  // nullptr: absent
  int64_t gap_bytes;    // of what lies between two rows
  DType dtype;
  int bytes;     // of an element
  bool vectors;  // elements e to e + W - 1, e a multiple of W, are whole 128-bit words
};

// v^beta.
enum class Power : int { none, one, half, other };

// How the weights of W neighbouring elements are read: one by one, in one access, or as one for all.
enum class WeightAccess : int { each, vector, one };

// Numbers of a call, as elements are computed: parameters of a kernel in either type take no register.
template <class Acc>
struct Numbers {
  Acc eps, beta;
  Acc constant;  // added to log v + r^2 / v: log(2 pi) or 0
};

struct HeteroscedasticArgs {
  Strided mean, target, raw, grad_mean, grad_target, grad_raw;  // [outer, row]; absent gradients are not written
  int64_t count;                                                // outer * row
  int64_t row;
  bool joined;  // no tensor has gaps
  Divisor by_row;
  int batches;  // of a block: kThreads vectors each

  Transform transform;
  Power power;
  Numbers<float> single;
  Numbers<double> wide;
  double k;
  const double* totals;  // [2] M and k, in place of that above, or absent
  bool negative_is_nan;

  // Masked kernels: the weight of each position.
  const unsigned char* positions;
  int position_bytes;  // of a weight: 1, or those of fp32 or fp64
  WeightAccess access;
  int64_t channels, inner;
  Divisor by_channels, by_inner;

  // Sums wanted (forward).
  double* partials;  // [blocks] the sweep's sums
  int64_t blocks;    // of the sweep
  void* loss;
  DType loss_dtype;
  bool overlap;  // the finish is started before the sweep's end

  // No sums wanted (backward): the incoming gradient.
  const void* g;
  DType g_dtype;

  template <class Acc>
  __device__ const Numbers<Acc>& numbers() const {
    if constexpr (is_double<Acc>)
      return wide;
    else
      return single;
  }
};

std::string describe(const HeteroscedasticArgs& a);

// How a triple of dtypes is computed: mean and raw share one.
template <class M, class T>
struct Triple {
  static constexpr bool any = is_any<M>;
  using Acc = typename Pair<M, T>::Acc;
  static constexpr int width = Pair<M, T>::width;  // elements a thread takes at a time
  // Whether the next are loaded while these are computed. 8 take so long that other warps are enough to wait with.
  static constexpr bool ahead = width < 8;
};

// The instantiated triples (mean and raw, target); the last takes every one that is not listed.
#ifndef VIDFAST_CUDA_TRIPLES
#define VIDFAST_CUDA_TRIPLES(X) \
  X(float, float)               \
  X(bf16, bf16)                 \
  X(f16, f16)                   \
  X(double, double)             \
  X(bf16, float)                \
  X(f16, float)                 \
  X(Any, Any)
#endif

// `sums`: forward, else backward.
void launch_heteroscedastic(const HeteroscedasticArgs& a, bool sums, cudaStream_t stream);
void launch_masked_heteroscedastic(const HeteroscedasticArgs& a, bool sums, cudaStream_t stream);

}  // namespace vidfast::cuda
