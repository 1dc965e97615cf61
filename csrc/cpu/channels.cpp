#include "channels.h"

#include <algorithm>

#include "half.h"
#include "threads.h"

namespace vidfast::cpu {
namespace {

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

}  // namespace

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

Channels::Channels(const void* alpha, DType alpha_dtype, int64_t channels, double eps, double values_per_channel,
                   int threads)
    : values(channels), m(values_per_channel), n(m * static_cast<double>(channels)) {
  for_channels(channels, threads, [&](int64_t c) { values[c] = channel_of(load_scalar(alpha, alpha_dtype, c), eps); });
}

double Channels::loss(const double* sum_sq, double k, bool full) const {
  // In groups, whose sums are added: of tens of thousands of channels one after another the rounding would show.
  constexpr int64_t kTogether = 128;
  const int64_t channels = static_cast<int64_t>(values.size());
  double sum = 0;
  for (int64_t begin = 0; begin < channels; begin += kTogether) {
    double group = 0;
    for (int64_t c = begin; c < std::min(begin + kTogether, channels); ++c)
      group += channel_loss(values[c], sum_sq[c], m);
    sum += group;
  }
  return total_loss(sum, k, n, full);
}

}  // namespace vidfast::cpu
