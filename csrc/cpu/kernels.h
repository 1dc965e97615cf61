// What the driver asks of an instruction set: a table of tile kernels, one entry per pair of dtypes.
#pragma once

#include <cstdint>

#include "../gaussian_nll.h"

namespace vidfast::cpu {

// A run of n neighbouring elements of one channel (the plane family).
struct Run {
  const void* mean;
  const void* target;
  void* grad_mean;    // may lie over mean; nullptr where not wanted
  void* grad_target;  // nullptr where not wanted
  int64_t n;
  double scale;  // g k / v_c
};

// rows x columns elements, each column with its own scale (the channel-fastest family).
struct Tile {
  const void* mean;
  const void* target;
  void* grad_mean;
  void* grad_target;
  int64_t mean_stride, target_stride, grad_mean_stride, grad_target_stride;  // in elements, between rows
  int64_t rows, columns;                                                     // columns <= kTileColumns
  const void* scale;  // [columns], fp32 or fp64 as the pair of dtypes computes in
  double* sum_sq;     // [columns], written
};

constexpr int64_t kTileColumns = 512;
// fp32 sums run over at most this many values before they are widened to fp64.
constexpr int64_t kRun = 64;

struct Kernels {
  // stream: write grad_mean past the caches. Each returns or stores S = sum r^2 of what it was given.
  double (*sum_run)(const Run&);
  double (*sum_grad_run)(const Run&, bool stream);
  void (*grad_run)(const Run&, bool stream);
  void (*sum_tile)(const Tile&);
  void (*sum_grad_tile)(const Tile&, bool stream);
  void (*grad_tile)(const Tile&, bool stream);
};

struct InstructionSet {
  const char* name;
  Kernels pair[4][4];                                                 // [mean dtype][target dtype]
  void (*scale[4])(const void* src, void* dst, int64_t n, double g);  // [dtype]
};

const InstructionSet& baseline_kernels();
#ifdef VIDFAST_X86
const InstructionSet& avx2_kernels();
const InstructionSet& avx512_kernels();
#endif
const InstructionSet& active_kernels();

inline bool computes_in_f64(DType mean, DType target) { return mean == DType::f64 || target == DType::f64; }

}  // namespace vidfast::cpu
