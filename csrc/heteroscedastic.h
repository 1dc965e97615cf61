// The second family: a Gaussian negative log-likelihood with one variance an element, which is predicted like the mean.
// Raw addresses, extents and dtypes, as in gaussian_nll.h; nothing of torch.
//
// With r = mean - target, v the variance and p = (dv / d raw) / v of an element, f = k w v^beta, and w = 1 without
// positions:
//
//   loss        = sum f / 2 (log v + r^2 / v), and f / 2 log(2 pi) for each element if `full`
//   d / d mean  = f r / v          d / d target = -f r / v
//   d / d raw   = f / 2 (1 - r^2 / v) p         (v^beta is taken for a constant: Seitzer et al., ICLR 2022)
//
// r, v and all that follows are formed in fp32, or in fp64 where one of the three tensors is; sums in a fixed order.
#pragma once

#include "gaussian_nll.h"

namespace vidfast {

// From raw to the variance.
enum class Transform : int {
  softplus = 0,      // v = softplus(raw) + eps
  exp = 1,           // v = exp(raw) + eps, eps > 0; log v and 1/v never overflow where raw is large
  log_variance = 2,  // v = exp(raw): raw is log v
  clamp = 3,         // v = max(raw, eps), with the gradient of v = raw (torch.nn.GaussianNLLLoss); NaN stays NaN
};

struct HeteroscedasticProblem {
  int64_t outer, row;      // N = outer * row, numbered e = o * row + j
  View mean, target, raw;  // element (o, j) is stored at data + o * outer_stride + j
  Transform transform;
  double eps;
  double beta;           // 0: v^beta is 1
  double k;              // weight / N ("mean"), weight ("sum"), weight / B ("batchmean")
  bool full;             // adds the constant
  bool negative_is_nan;  // clamp: v is NaN where raw < 0, and with it the loss and the element's gradients

  // Weights >= 0 of positions, without gaps: bytes, or numbers of the type that r is computed in. Element e has the
  // weight of position e / (channels * inner) * inner + e % inner. Where it is 0 mean, target and raw are not used, and
  // gradients are 0. nullptr: 1 everywhere.
  const void* positions = nullptr;
  bool positions_are_bytes = false;
  int64_t channels = 1, inner = 1;
  // [2] on the device: M and k, of which k is read in place of the one above; with positions always.
  const double* totals = nullptr;
};

namespace cpu {

void heteroscedastic_forward(const HeteroscedasticProblem& p, void* loss, DType loss_dtype, int threads);

// The same loss, and for an incoming gradient of 1 the gradients that are there (data == nullptr: not wanted), each in
// its tensor's dtype. grad_mean may be mean itself, and grad_raw raw.
void heteroscedastic_forward_grad(const HeteroscedasticProblem& p, void* loss, DType loss_dtype, const View& grad_mean,
                                  const View& grad_raw, int threads);

// Gradients for the incoming gradient *g, a scalar in memory; those that are there.
void heteroscedastic_backward(const HeteroscedasticProblem& p, const void* g, DType g_dtype, const View& grad_mean,
                              const View& grad_target, const View& grad_raw, int threads);

// to[i] = "exp", "exp_of_negative", "log", "log_of_normal" or "log1p" (of 0 to 1) of from[i], n numbers, by the
// instruction set in use; false: there is no such function. For tests.
bool vector_function(const char* name, bool f64, const void* from, void* to, int64_t n);

}  // namespace cpu

// The same on the current CUDA device: see gaussian_nll.h.
namespace cuda {

// Bytes, on an 8-byte address, that forward and forward_grad need for themselves until the stream has passed them.
int64_t heteroscedastic_workspace_bytes(int64_t outer, int64_t row, DType mean, DType target, DType raw);

void heteroscedastic_forward(const HeteroscedasticProblem& p, void* loss, DType loss_dtype, void* workspace,
                             Stream stream);
void heteroscedastic_forward_grad(const HeteroscedasticProblem& p, void* loss, DType loss_dtype, const View& grad_mean,
                                  const View& grad_raw, void* workspace, Stream stream);
void heteroscedastic_backward(const HeteroscedasticProblem& p, const void* g, DType g_dtype, const View& grad_mean,
                              const View& grad_target, const View& grad_raw, Stream stream);

}  // namespace cuda
}  // namespace vidfast
