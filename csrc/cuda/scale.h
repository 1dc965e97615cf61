// What the scale kernel is launched with.
#pragma once

#include <string>

#include "element.h"

namespace vidfast::cuda {

struct ScaleArgs {
  const void* g;
  DType g_dtype;
  Tensor source, result;  // `outer` rows of `row` elements; absent or both there, perhaps the same
  int64_t outer, row;
  int64_t piece, pieces;  // elements of a row in a chunk, chunks of a row
  Divisor by_pieces;
  const double* grad_alpha;  // [C] or absent
  void* grad_alpha_out;      // [C] of alpha's dtype
  DType alpha_dtype;
  int64_t channels;
};

std::string describe(const ScaleArgs& a);
void launch_scale(const ScaleArgs& a, cudaStream_t stream);

}  // namespace vidfast::cuda
