// The interface of heads: a regressor and its loss in one pass. Raw addresses, extents and dtypes; nothing of torch.
#pragma once

#include "gaussian_nll.h"

namespace vidfast {

// A head: a stack of layers over the channels with ReLU between, and the loss of what the last one gives. The loss and
// every gradient for an incoming gradient of 1, in one pass over the positions: see head.cpp.
constexpr int kMostLayers = 3;

// A layer's values over (batch, channels, positions), with any strides, in elements.
struct Feature {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch_stride = 0, channel_stride = 0, position_stride = 0;
};

struct HeadLayer {
  const void* weight;  // [out, into] without gaps, rounded to the module's dtype on the way
  DType weight_dtype;
  const void* bias;  // [out] or nullptr, likewise
  DType bias_dtype;
  int64_t into, out;
  float* grad_weight;  // [out, into] or nullptr
  float* grad_bias;    // [out] or nullptr
};

namespace cpu {
struct HeadKernels;
}

struct HeadProblem {
  const cpu::HeadKernels* kernels;     // of cpu::head_kernels, for the module's dtype
  int64_t batch, channels, positions;  // of the target
  Feature student, target;
  int layer_count;
  HeadLayer layers[kMostLayers];
  const void* alpha;
  DType alpha_dtype;
  double eps, k;
  DType module;          // what a layer gives: f32, bf16 or f16
  Feature grad_student;  // data nullptr: not wanted
  double* grad_alpha;    // [C]; nullptr: the loss alone

  // [batch, positions] without gaps, w_p >= 0: bytes or fp32; nullptr: 1 everywhere. Residuals count by them, and where
  // one is 0 the student is taken as 0, its gradient is 0, and the target is not used.
  const void* weights = nullptr;
  bool weights_are_bytes = false;
  double values = 0;  // M, their sum; of no use without them
};

namespace cpu {

// The kernels for heads whose layers give that dtype, of the instruction set in use; nullptr: it has none.
const HeadKernels* head_kernels(DType module);
// The name of their instructions for so many layers, or nullptr.
const char* head_instructions(DType module, int64_t layer_count);
// Bytes of the workspace that `head` needs, on a 64-byte address.
int64_t head_workspace_bytes(const HeadProblem& p, int threads);
void head(const HeadProblem& p, float* loss, void* workspace, int threads);

}  // namespace cpu
}  // namespace vidfast
