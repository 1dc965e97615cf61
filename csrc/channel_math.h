// Everything that is computed once per channel, in fp64: the variance, the channel's share of the loss and
// d/d alpha. One copy for the CPU and the GPU.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define VIDFAST_HD __host__ __device__
#else
#define VIDFAST_HD
#endif

namespace vidfast {

constexpr double kLog2Pi = 1.8378770664093454835606594728112;

struct Channel {
  double variance;  // softplus(alpha) + eps
  double log_variance;
  double sigmoid;  // d variance / d alpha
};

// softplus(a) = max(a, 0) + log1p(exp(-|a|)): exp never overflows, and tiny variances keep their digits.
VIDFAST_HD inline Channel channel_of(double alpha, double eps) {
  const double e = exp(-fabs(alpha));
  const double l = log1p(e);
  Channel c;
  c.variance = (alpha > 0 ? alpha + l : (alpha <= 0 ? l : alpha)) + eps;  // the last arm keeps NaN
  c.log_variance = log(c.variance);
  c.sigmoid = (alpha >= 0 ? 1.0 : e) / (1.0 + e);
  return c;
}

// M/2 log v + S/(2 v): equation 5 of the paper summed over one channel's M elements, without the constant.
VIDFAST_HD inline double channel_loss(const Channel& c, double sum_sq, double m) {
  return 0.5 * (m * c.log_variance + sum_sq / c.variance);
}

// d channel_loss / d alpha = [M/(2 v) - S/(2 v^2)] sigmoid(alpha).
VIDFAST_HD inline double channel_grad_alpha(const Channel& c, double sum_sq, double m) {
  return 0.5 * (m - sum_sq / c.variance) / c.variance * c.sigmoid;
}

// k * (sum of channel losses [+ N/2 log(2 pi)]).
VIDFAST_HD inline double total_loss(double sum_of_channels, double k, double n, bool full) {
  return k * (full ? sum_of_channels + 0.5 * n * kLog2Pi : sum_of_channels);
}

}  // namespace vidfast
