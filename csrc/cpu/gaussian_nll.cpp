// The CPU back end's primitives: per-channel mathematics in fp64 around one sweep over the activations.
#include "../gaussian_nll.h"

#include <algorithm>
#include <vector>

#include "channels.h"
#include "kernels.h"
#include "sweep.h"
#include "threads.h"

namespace vidfast::cpu {
namespace {

Channels channels_of(const Problem& p, int threads) {
  const double m = p.totals != nullptr ? p.totals[0] : static_cast<double>(p.outer) * static_cast<double>(p.inner);
  return Channels(p.alpha, p.alpha_dtype, p.channels, p.eps, m, threads);
}

double k_of(const Problem& p) { return p.totals != nullptr ? p.totals[1] : p.k; }

std::vector<double> scales(const Problem& p, const Channels& channels, double gk) {
  std::vector<double> scale(p.channels);
  for (int64_t c = 0; c < p.channels; ++c) scale[c] = gk / channels.values[c].variance;
  return scale;
}

// Tensors that together exceed a core's share of any cache are written past it: by the time the gradient is
// read, it would not be there any more. (sysconf's cache size counts a whole socket's on some processors.)
constexpr int64_t kStreamBytes = int64_t{32} << 20;

int64_t elements(const Problem& p) { return p.outer * p.channels * p.inner; }

bool exceeds_cache(const Problem& p, const View& grad) {
  return elements(p) * (size_of(p.mean.dtype) + size_of(p.target.dtype) + size_of(grad.dtype)) >= kStreamBytes;
}

}  // namespace

void forward(const Problem& p, void* loss, DType loss_dtype, double* sum_sq, int threads) {
  const Channels channels = channels_of(p, threads);
  Sweep s;
  s.sum_sq = sum_sq;
  sweep(p, s, threads);
  store_scalar(loss, loss_dtype, 0, channels.loss(sum_sq, k_of(p), p.full));
}

void forward_grad(const Problem& p, void* loss, DType loss_dtype, const View& grad_mean, double* grad_alpha,
                  int threads) {
  const Channels channels = channels_of(p, threads);
  const double k = k_of(p);
  const std::vector<double> scale = scales(p, channels, k);
  std::vector<double> sum_sq(p.channels);
  Sweep s;
  s.grad_mean = grad_mean;
  s.scale = scale.data();
  s.sum_sq = sum_sq.data();
  s.stream = grad_mean.data != p.mean.data && exceeds_cache(p, grad_mean);
  sweep(p, s, threads);
  store_scalar(loss, loss_dtype, 0, channels.loss(sum_sq.data(), k, p.full));
  for (int64_t c = 0; c < p.channels; ++c)
    grad_alpha[c] = k * channel_grad_alpha(channels.values[c], sum_sq[c], channels.m);
}

void backward(const Problem& p, const void* g, DType g_dtype, const double* sum_sq, const View& grad_mean,
              const View& grad_target, void* grad_alpha, int threads) {
  const Channels channels = channels_of(p, threads);
  const double gk = load_scalar(g, g_dtype, 0) * k_of(p);
  if (grad_alpha != nullptr)
    for (int64_t c = 0; c < p.channels; ++c)
      store_scalar(grad_alpha, p.alpha_dtype, c, gk * channel_grad_alpha(channels.values[c], sum_sq[c], channels.m));
  if (grad_mean.data == nullptr && grad_target.data == nullptr) return;
  const std::vector<double> scale = scales(p, channels, gk);
  Sweep s;
  s.grad_mean = grad_mean;
  s.grad_target = grad_target;
  s.scale = scale.data();
  s.stream = grad_mean.data != nullptr && exceeds_cache(p, grad_mean);
  sweep(p, s, threads);
}

void scale(const void* g, DType g_dtype, int64_t outer, int64_t row, const View& src, const View& dst, int64_t channels,
           const double* grad_alpha, void* grad_alpha_out, DType alpha_dtype, int threads) {
  const double factor = load_scalar(g, g_dtype, 0);
  if (grad_alpha != nullptr)
    for (int64_t c = 0; c < channels; ++c) store_scalar(grad_alpha_out, alpha_dtype, c, grad_alpha[c] * factor);
  if (src.data == nullptr || (factor == 1.0 && src.data == dst.data)) return;

  if (src.outer_stride == row && dst.outer_stride == row) {
    row *= outer;
    outer = 1;
  }
  constexpr int64_t kPiece = 16384;
  constexpr int64_t kScaledAsleep = 300000;  // what one thread scales while another wakes up
  const int64_t pieces = (row + kPiece - 1) / kPiece;
  const auto kernel = active_kernels().scale[static_cast<int>(src.dtype)];
  const int64_t size = size_of(src.dtype);
  threads = outer * row < 32768 ? 1 : worth_waking(threads, outer * row, kScaledAsleep);
  parallel_for(outer * pieces, threads, [&](int64_t task) {
    const int64_t begin = task % pieces * kPiece;
    const auto at = [&](const View& v) {
      return static_cast<char*>(v.data) + (task / pieces * v.outer_stride + begin) * size;
    };
    kernel(at(src), at(dst), std::min(kPiece, row - begin), factor);
  });
}

}  // namespace vidfast::cpu
