// What every kernel of the loss is launched with.
#pragma once

#include <string>

#include "../channel_math.h"
#include "chunks.h"
#include "element.h"

namespace vidfast::cuda {

struct Args {
  Tensor mean, target, grad_mean, grad_target;  // [outer, C, inner]; absent gradients are not written
  int64_t outer, channels, inner;
  const void* alpha;  // [C]
  DType alpha_dtype;
  int64_t alpha_bytes;
  double eps, k;
  double m;  // outer * inner
  bool full;

  // Masked kernels: the weight of each position.
  const unsigned char* positions;  // [outer, inner] or absent
  int position_bytes;              // of a weight: 1, or those of fp32 or fp64
  bool one_position;               // RowChunks: the columns of a thread are of one position
  const double* totals;            // [2] M and k, in place of those above, or absent

  // Sums wanted (forward): the outputs of the finish, and the workspace.
  void* loss;
  DType loss_dtype;
  double* sum_sq;      // [C] or absent
  double* grad_alpha;  // [C] or absent
  unsigned* counter;   // blocks of the finish that are done; the sweep sets it to zero
  double* losses;      // [blocks of the finish] their channels' losses
  double* partials;    // PlaneChunks: [outer_blocks * pieces, C]; RowChunks: [row_chunks, sums]

  // No sums wanted (backward): the incoming gradient, and d/d alpha from forward's sums.
  const void* g;
  DType g_dtype;
  const double* saved_sum_sq;  // [C]
  void* grad_alpha_out;        // [C] of alpha's dtype, or absent

  bool prefetch;
  bool vectors;  // RowChunks: every tensor's rows are whole vectors on 16-byte addresses
  bool overlap;  // the finish is started before the sweep's end
  PlaneChunks planes;
  RowChunks rows;
  FinishBlocks blocks;  // of the finish
};

std::string describe(const Args& a);

// The instantiated pairs (mean, target); X(M, T, "name"). The last takes every pair that is not listed.
#ifndef VIDFAST_CUDA_PAIRS
#define VIDFAST_CUDA_PAIRS(X) \
  X(float, float)             \
  X(bf16, bf16)               \
  X(f16, f16)                 \
  X(double, double)           \
  X(float, bf16)              \
  X(float, f16)               \
  X(bf16, float)              \
  X(f16, float)               \
  X(Any, Any)
#endif

template <class T>
constexpr bool is_of(DType t) {
  if constexpr (is_any<T>)
    return true;
  else
    return std::is_same_v<T, float>  ? t == DType::f32
           : std::is_same_v<T, bf16> ? t == DType::bf16
           : std::is_same_v<T, f16>  ? t == DType::f16
                                     : t == DType::f64;
}

// Elements in a vector of this pair.
inline int width_of(DType mean, DType target) {
#define VIDFAST_WIDTH(M, T) \
  if (is_of<M>(mean) && is_of<T>(target)) return Pair<M, T>::width;
  VIDFAST_CUDA_PAIRS(VIDFAST_WIDTH)
#undef VIDFAST_WIDTH
  return 1;
}

// The two mappings, without and with weights of positions; `sums`: forward, else backward.
void launch_planes(const Args& a, bool sums, cudaStream_t stream);
void launch_rows(const Args& a, bool sums, cudaStream_t stream);
void launch_masked_planes(const Args& a, bool sums, cudaStream_t stream);
void launch_masked_rows(const Args& a, bool sums, cudaStream_t stream);
// From the partial sums of either to the loss and d/d alpha.
void launch_finish(const Args& a, cudaStream_t stream);
// d/d alpha alone.
void launch_alpha(const Args& a, cudaStream_t stream);

}  // namespace vidfast::cuda
