// One pass over the activations: cut into tasks of fixed size, run by any number of threads.
#pragma once

#include "../gaussian_nll.h"

namespace vidfast::cpu {

struct Sweep {
  View grad_mean, grad_target;    // data == nullptr: not wanted
  const double* scale = nullptr;  // [C] g k / v_c; needed if a gradient is wanted
  double* sum_sq = nullptr;       // [C] receives S_c; nullptr: not wanted
  bool stream = false;            // write grad_mean past the caches where alignment allows
};

// The order of summation is fixed by the shape, the dtypes and the instruction set, never by the threads.
void sweep(const Problem& p, const Sweep& s, int threads);

}  // namespace vidfast::cpu
