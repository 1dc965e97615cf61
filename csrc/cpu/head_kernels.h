// What a head's driver (head.cpp) asks of an instruction set: to pack weights, to compute a tile of positions, and to
// add up a block of a weight's gradient; and the memory of these.
//
// A layer's activations are matrices of 32-bit words in one of two forms. `rows`: a position after the other, the
// channels fastest. `pairs`: two positions after the other, where 16-bit values of both share a word, so that a product
// over the positions multiplies words too; in fp32 a word is one value and the two forms are one.
#pragma once

#include <cstdint>

#include "../head.h"

namespace vidfast::cpu {

constexpr int64_t kHeadTile = 64;   // positions of a task; sums of squares run over so many in fp32
constexpr int64_t kHeadDepth = 64;  // positions that a product over them adds in fp32 before the sum takes them
constexpr int64_t kHeadPad = 16;    // channels are filled up with zeros to a multiple of this
constexpr int64_t kHeadBlock = 16;  // rows of a weight's gradient that are one task
static_assert(kHeadDepth == kHeadTile, "a tile is of one unit, and one that is left out a whole sum");

namespace {  // per translation unit: each instruction set compiles its own copy
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t padded(int64_t channels) { return round_up(channels, kHeadPad); }
}  // namespace

struct HeadMatrix {
  float* rows = nullptr;
  float* pairs = nullptr;
  int64_t row = 0, pair = 0;  // words from one to the next
};

// A layer for one call: its sizes, filled up, and its weight in panels for the product forward and for the one back.
struct HeadLayerPlan {
  int64_t into = 0, out = 0;
  float* forward = nullptr;
  float* backward = nullptr;
  float* bias = nullptr;       // [out] or nullptr
  float* bias_sums = nullptr;  // [tiles of the memory, out] or nullptr
};

// Some neighbouring positions, what is to be done with them, and the memory for it.
struct HeadPart {
  const HeadProblem* problem;
  HeadLayerPlan layers[kMostLayers];
  HeadMatrix activations[kMostLayers];    // what goes into a layer
  HeadMatrix gradients[kMostLayers + 1];  // of what goes into a layer, and at last of the mean
  const float* scale;                     // [C, filled up] k / v_c
  double* sum_sq;                         // [tiles of the memory, C, filled up]
  bool* left_out;        // [tiles of the memory] whether none of a tile's positions counts; nullptr: all do
  int64_t begin, count;  // positions of the whole; begin is a multiple of `unit`
  int64_t lowest;        // of `gradients` the lowest that is needed; 0: the student's; above layer_count: none
  // A weight's gradient takes the products of `unit` positions at once, a multiple of kHeadDepth. Those of the n'th
  // unit are added to its (n % lanes)'th sum.
  int64_t unit, lanes;
  float* first_lane[kMostLayers];   // [out, into], filled up
  float* other_lanes[kMostLayers];  // [lanes - 1, out, into]
};

struct HeadKernels {
  const char* name;
  int64_t words(int64_t channels) const { return pairs ? channels / 2 : channels; }  // of a row
  bool pairs;
  // A weight's panels, forward or back; `panel` is one of panels(columns).
  int64_t (*panels)(int64_t columns);
  void (*pack)(const HeadLayer& layer, bool forward, int64_t panel, float* to);
  // Forward, loss, and back as far as needed, of the tile'th kHeadTile positions of a part.
  void (*tile)(const HeadPart& part, int64_t tile);
  // A weight's gradient: its block'th kHeadBlock rows in one panel's columns, over all positions of a part.
  void (*outer)(const HeadPart& part, int64_t layer, int64_t panel, int64_t block);
};

#ifdef VIDFAST_X86
const HeadKernels* avx2_head_kernels(DType module);
const HeadKernels* avx512_head_kernels(DType module);
const HeadKernels* avx512_bf16_head_kernels(DType module);
#endif

}  // namespace vidfast::cpu
