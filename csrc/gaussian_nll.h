// The one interface of the native code: what a Gaussian negative log-likelihood problem is, and the
// primitives that every back end offers. Raw addresses, extents and dtypes; nothing of torch.
#pragma once

#include <cstdint>
#include <string>

namespace vidfast {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

inline int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// A dense view of an activation: element (o, c, i) is stored at data + o * outer_stride + c * inner + i,
// in elements. Every layout of torch that vidfast takes without a copy is of this form.
struct View {
  void* data = nullptr;
  int64_t outer_stride = 0;
  DType dtype = DType::f32;
};

struct Problem {
  int64_t outer, channels, inner;  // N = outer * channels * inner
  View mean, target;               // [outer, C, inner]
  const void* alpha;               // [C], contiguous
  DType alpha_dtype;
  double eps;  // variance_c = softplus(alpha_c) + eps
  double k;    // weight / N ("mean"), weight ("sum"), weight / B ("batchmean")
  bool full;   // adds k * M C / 2 * log(2 pi) to the loss

  // [outer, inner] w_p >= 0, one weight a position for all channels: bytes, or numbers of the type that r is computed
  // in. S_c is then sum w_p r^2 and M sum w_p. Where w_p is 0 mean and target are not used. nullptr: 1 everywhere.
  const void* positions = nullptr;
  bool positions_are_bytes = false;
  // [2] on the device: M and k, from `total`; with positions always. nullptr: M is outer * inner, and k the one above.
  const double* totals = nullptr;
};

// What is known on the device alone: M and k of a call with a weight a position, or with a weight that is a tensor.
struct Total {
  const void* positions;  // [count], as in Problem, or nullptr: M is `count`
  bool positions_are_bytes;
  bool positions_are_f64;  // where they are no bytes: fp64, else fp32
  int64_t count;
  const void* factor;  // one number that k is multiplied by, or nullptr
  DType factor_dtype;
  double k;
  int64_t channels;  // if not 0, k is divided by M times this; with positions k is 0 where M is
};

namespace cpu {

// totals [2] = M, k; the positions' sum in an order that follows from their number alone.
void total(const Total& t, double* totals, int threads);

// loss = k * sum_c [ M/2 log v_c + S_c / (2 v_c) ];  sum_sq [C] fp64 receives S_c = sum r^2, r = mean - target.
void forward(const Problem& p, void* loss, DType loss_dtype, double* sum_sq, int threads);

// The same loss, and for an incoming gradient of 1: grad_mean = k r / v_c in its own dtype, which may be
// mean itself, and grad_alpha [C] in fp64.
void forward_grad(const Problem& p, void* loss, DType loss_dtype, const View& grad_mean, double* grad_alpha,
                  int threads);

// Gradients for the incoming gradient *g, a scalar in memory. Any of the three outputs may be absent (nullptr).
// sum_sq [C] is forward's; mean and target are read only if grad_mean or grad_target is wanted.
void backward(const Problem& p, const void* g, DType g_dtype, const double* sum_sq, const View& grad_mean,
              const View& grad_target, void* grad_alpha, int threads);

// dst = src * *g over [outer, row] elements of one dtype; src == dst is allowed and then *g == 1 touches nothing.
// grad_alpha_out [C] (alpha's dtype) = grad_alpha [C] (fp64) * *g; either pair may be absent.
void scale(const void* g, DType g_dtype, int64_t outer, int64_t row, const View& src, const View& dst, int64_t channels,
           const double* grad_alpha, void* grad_alpha_out, DType alpha_dtype, int threads);

// What lies between a regressor's products, over n neighbouring elements of one dtype. Values are rounded to `rounded`,
// another of the floating types, and kept in `dtype`; the two are the same where nothing is rounded.
// x = max(x, 0) where `positive`, else x; NaN stays NaN, as in torch.relu.
void rectify(void* x, DType dtype, DType rounded, bool positive, int64_t n, int threads);
// out = gradient where activation, what a ReLU gave, is not 0, else 0. out may be either of the others.
void rectify_backward(const void* gradient, const void* activation, void* out, DType dtype, DType rounded, int64_t n,
                      int threads);

// The instruction set in use ("baseline", "avx2", "avx512", "avx512_bf16"); select() returns false for one this
// processor lacks.
const char* isa();
bool select_isa(const char* name);

// The OpenMP runtime whose threads are used, or "none".
const char* openmp_runtime();

}  // namespace cpu

// The same primitives on the current CUDA device: addresses are the device's, work is put on `stream` and not waited
// for, errors of a launch are thrown as std::runtime_error with the kernel and its arguments.
namespace cuda {

using Stream = void*;  // a cudaStream_t

// Bytes, on an 8-byte address, that forward and forward_grad need for themselves until the stream has passed them.
int64_t workspace_bytes(int64_t outer, int64_t channels, int64_t inner, int64_t mean_stride, int64_t target_stride,
                        DType mean, DType target);

// totals [2] = M, k; the positions' sum in an order that follows from their number alone. `workspace`: of
// total_workspace_bytes, on an 8-byte address.
int64_t total_workspace_bytes(int64_t count);
void total(const Total& t, double* totals, void* workspace, Stream stream);

void forward(const Problem& p, void* loss, DType loss_dtype, double* sum_sq, void* workspace, Stream stream);
void forward_grad(const Problem& p, void* loss, DType loss_dtype, const View& grad_mean, double* grad_alpha,
                  void* workspace, Stream stream);
void backward(const Problem& p, const void* g, DType g_dtype, const double* sum_sq, const View& grad_mean,
              const View& grad_target, void* grad_alpha, Stream stream);
void scale(const void* g, DType g_dtype, int64_t outer, int64_t row, const View& source, const View& result,
           int64_t channels, const double* grad_alpha, void* grad_alpha_out, DType alpha_dtype, Stream stream);

// Why no CUDA device can be used, or "" (no driver, too old a driver, no device).
std::string unavailable();
// Why the current device cannot run this build, or "".
std::string device_unsupported();
// The architectures it was built for, and the versions of the runtime inside and of the driver (12040 is 12.4).
std::string architectures();
int runtime_version();
int driver_version();

}  // namespace cuda
}  // namespace vidfast
