// What the driver (heteroscedastic.cpp) asks of an instruction set: passes over neighbouring elements, each with its
// own variance, and copies between a dtype and the type that is computed in.
#pragma once

#include <cstdint>

#include "../heteroscedastic.h"

namespace vidfast::cpu {

// n neighbouring elements; mean, target, raw and the gradients are of one dtype.
struct Elements {
  const void* mean;
  const void* target;
  const void* raw;
  void* grad_mean;  // may be mean; each nullptr where not wanted
  void* grad_target;
  void* grad_raw;       // may be raw
  const void* weights;  // [n] in the type that is computed in, or nullptr: 1 each
  int64_t n;
};

// What is the same for all elements.
struct ElementConstants {
  double eps, beta;
  double scale;     // g k
  double constant;  // log(2 pi) or 0
  bool negative_is_nan;
};

// `count` elements of rows, from the first'th of one row on.
struct RowWalk {
  int64_t first, count, row, stride;
};

// An element adds w v^beta (log v + r^2 / v + constant) to what a pass returns.
using ElementPass = double (*)(const Elements&, const ElementConstants&, bool stream);

struct ElementPasses {
  ElementPass sum, sum_grad, grad;  // stream: write grad_mean and grad_raw past the caches
};

constexpr const char* kFunctions[] = {"exp", "exp_of_negative", "log", "log_of_normal", "log1p"};

struct Functions {
  void (*of[5])(const void* from, void* to, int64_t n);
};

struct HeteroscedasticKernels {
  ElementPasses passes[4][4];  // [dtype][transform]
  // From a dtype to neighbours in the type that is computed in, and back: [whether that is fp64][dtype]. `to` and
  // `from` are the row in which the first of them is stored; fp64 is never read into fp32.
  void (*gather[2][4])(const void* from, const RowWalk& walk, void* to);
  void (*scatter[2][4])(const void* from, const RowWalk& walk, void* to);
  // Of the vector functions alone, for their tests: [whether fp64], in the order of kFunctions.
  Functions functions[2];
};

const HeteroscedasticKernels& baseline_heteroscedastic();
#ifdef VIDFAST_X86
const HeteroscedasticKernels& avx2_heteroscedastic();
const HeteroscedasticKernels& avx512_heteroscedastic();
#endif

}  // namespace vidfast::cpu
