// What the driver asks of an instruction set: a table of tile kernels, one entry per pair of dtypes.
#pragma once

#include <cstdint>

#include "../gaussian_nll.h"

namespace vidfast::cpu {

// Runs of n neighbouring elements of one channel each, one behind the other (the plane family).
struct Runs {
  const void* mean;
  const void* target;
  void* grad_mean;    // may be mean; nullptr where not wanted
  void* grad_target;  // nullptr where not wanted
  int64_t n, channels;
  const double* scale;  // [channels] g k / v_c
  double* sum_sq;       // [channels] receives sum r^2, or has it added
  bool add;
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

// A tile as wide as its row is one block of memory; one that is narrower jumps, where the prefetcher does not follow.
constexpr int64_t kTileColumns = 2048;
// fp32 sums run over at most this many values before they are widened to fp64.
constexpr int64_t kRun = 64;

struct Kernels {
  // stream: write grad_mean past the caches
  void (*sum_runs)(const Runs&);
  void (*sum_grad_runs)(const Runs&, bool stream);
  void (*grad_runs)(const Runs&, bool stream);
  void (*sum_tile)(const Tile&);
  void (*sum_grad_tile)(const Tile&, bool stream);
  void (*grad_tile)(const Tile&, bool stream);
};

struct HeadKernels;

struct InstructionSet {
  const char* name;
  const HeadKernels* (*head)(DType module);                           // gives nullptr where it has none
  Kernels pair[4][4];                                                 // [mean dtype][target dtype]
  void (*scale[4])(const void* src, void* dst, int64_t n, double g);  // [dtype]
  void (*positive[4])(void* x, int64_t n);                            // [dtype] max(x, 0), and NaN
  void (*where_positive[4])(const void* gradient, const void* activation, void* out, int64_t n);  // [dtype]
  void (*round[4])(float* x, int64_t n);  // [dtype] to the values of that dtype, in place
};

const InstructionSet& baseline_kernels();
#ifdef VIDFAST_X86
const InstructionSet& avx2_kernels();
const InstructionSet& avx512_kernels();
const InstructionSet& avx512_bf16_kernels();
#endif
const InstructionSet& active_kernels();

inline bool computes_in_f64(DType mean, DType target) { return mean == DType::f64 || target == DType::f64; }

}  // namespace vidfast::cpu
