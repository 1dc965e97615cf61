// The CPU back end's primitives: per-channel mathematics in fp64 around one sweep over the activations.
#include "../gaussian_nll.h"

#include <algorithm>
#include <vector>

#include "../channel_math.h"
#include "half.h"
#include "kernels.h"
#include "sweep.h"
#include "threads.h"

namespace vidfast::cpu {
namespace {

double load_scalar(const void* base, DType t, int64_t i) {
  switch (t) {
    case DType::f32: return static_cast<const float*>(base)[i];
    case DType::f64: return static_cast<const double*>(base)[i];
    case DType::bf16: return to_float(static_cast<const bf16*>(base)[i]);
    case DType::f16: return to_float(static_cast<const f16*>(base)[i]);
  }
  return 0;
}

void store_scalar(void* base, DType t, int64_t i, double x) {
  switch (t) {
    case DType::f32: static_cast<float*>(base)[i] = static_cast<float>(x); break;
    case DType::f64: static_cast<double*>(base)[i] = x; break;
    case DType::bf16: static_cast<bf16*>(base)[i] = to_bf16(static_cast<float>(x)); break;
    case DType::f16: static_cast<f16*>(base)[i] = to_f16(static_cast<float>(x)); break;
  }
}

// Exponentials and logarithms of this many channels pay for a task of their own.
constexpr int64_t kChannelsPerTask = 128;
// What one thread does while another wakes up.
constexpr int64_t kChannelsAsleep = 2048;

template <class F>
void for_channels(int64_t channels, int threads, const F& f) {
  const int64_t tasks = (channels + kChannelsPerTask - 1) / kChannelsPerTask;
  parallel_for(tasks, worth_waking(threads, channels, kChannelsAsleep), [&](int64_t task) {
    const int64_t end = std::min(channels, (task + 1) * kChannelsPerTask);
    for (int64_t c = task * kChannelsPerTask; c < end; ++c) f(c);
  });
}

struct Channels {
  std::vector<Channel> values;  // [C]
  double m, n;                  // values per channel, values in all

  Channels(const Problem& p, int threads)
      : values(p.channels),
        m(static_cast<double>(p.outer) * static_cast<double>(p.inner)),
        n(m * static_cast<double>(p.channels)) {
    for_channels(p.channels, threads,
                 [&](int64_t c) { values[c] = channel_of(load_scalar(p.alpha, p.alpha_dtype, c), p.eps); });
  }
};

void store_loss(const Problem& p, const Channels& channels, const double* sum_sq, void* loss, DType loss_dtype) {
  // In groups, whose sums are added: of tens of thousands of channels one after another the rounding would show.
  constexpr int64_t kGroup = 128;
  double sum = 0;
  for (int64_t begin = 0; begin < p.channels; begin += kGroup) {
    double group = 0;
    for (int64_t c = begin; c < std::min(begin + kGroup, p.channels); ++c)
      group += channel_loss(channels.values[c], sum_sq[c], channels.m);
    sum += group;
  }
  store_scalar(loss, loss_dtype, 0, total_loss(sum, p.k, channels.n, p.full));
}

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
  const Channels channels(p, threads);
  Sweep s;
  s.sum_sq = sum_sq;
  sweep(p, s, threads);
  store_loss(p, channels, sum_sq, loss, loss_dtype);
}

void forward_grad(const Problem& p, void* loss, DType loss_dtype, const View& grad_mean, double* grad_alpha,
                  int threads) {
  const Channels channels(p, threads);
  const std::vector<double> scale = scales(p, channels, p.k);
  std::vector<double> sum_sq(p.channels);
  Sweep s;
  s.grad_mean = grad_mean;
  s.scale = scale.data();
  s.sum_sq = sum_sq.data();
  s.stream = grad_mean.data != p.mean.data && exceeds_cache(p, grad_mean);
  sweep(p, s, threads);
  store_loss(p, channels, sum_sq.data(), loss, loss_dtype);
  for (int64_t c = 0; c < p.channels; ++c)
    grad_alpha[c] = p.k * channel_grad_alpha(channels.values[c], sum_sq[c], channels.m);
}

void backward(const Problem& p, const void* g, DType g_dtype, const double* sum_sq, const View& grad_mean,
              const View& grad_target, void* grad_alpha, int threads) {
  const Channels channels(p, threads);
  const double gk = load_scalar(g, g_dtype, 0) * p.k;
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
