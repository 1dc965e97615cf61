// What belongs to a channel, in fp64: one copy for the loss alone and for heads.
#pragma once

#include <vector>

#include "../channel_math.h"
#include "../gaussian_nll.h"

namespace vidfast::cpu {

double load_scalar(const void* base, DType t, int64_t i);
void store_scalar(void* base, DType t, int64_t i, double x);

struct Channels {
  std::vector<Channel> values;  // [C]
  double m, n;                  // values per channel, values in all

  Channels(const void* alpha, DType alpha_dtype, int64_t channels, double eps, double values_per_channel, int threads);

  // k * [sum of the channels' shares of the loss]; sum_sq [C] is sum r^2.
  double loss(const double* sum_sq, double k, bool full) const;
};

}  // namespace vidfast::cpu
