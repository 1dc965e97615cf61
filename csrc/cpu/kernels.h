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
  double* sum_sq;       // [channels] receives sum w r^2, or has it added
  bool add;
  const void* weights;  // [n] of the positions, the same for all channels, or nullptr
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
  // Of the row's positions, bytes or in the compute type, or nullptr. Column j is of position
  // (first + j) / (channels * inner) * inner + (first + j) % inner, of which a row has row_positions.
  const void* weights;
  bool weights_are_bytes;
  int64_t row_positions, channels, inner, first;
};

// A tile as wide as its row is one block of memory; one that is narrower jumps, where the prefetcher does not follow.
constexpr int64_t kTileColumns = 2048;
// fp32 sums run over at most this many values before they are widened to fp64.
constexpr int64_t kRun = 64;

// What the positions of runs weigh, and those of a tile: 1 each, bytes, or numbers of the compute type; 1 each, the
// same for all columns of a row, or a column's own.
enum RunWeights { kRunOnes, kRunBytes, kRunNumbers };
enum TileWeights { kTileOnes, kTileByRow, kTileByColumn };

// One pass over runs or a tile.
template <class Job>
struct Passes {
  // stream: write grad_mean past the caches
  void (*sum)(const Job&, bool stream);
  void (*sum_grad)(const Job&, bool stream);
  void (*grad)(const Job&, bool stream);
};

struct Kernels {
  Passes<Runs> runs[3];   // [RunWeights]
  Passes<Tile> tiles[3];  // [TileWeights]
};

struct HeadKernels;
struct HeteroscedasticKernels;

struct InstructionSet {
  const char* name;
  const HeadKernels* (*head)(DType module);  // gives nullptr where it has none
  const HeteroscedasticKernels& (*heteroscedastic)();
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
