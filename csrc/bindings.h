// How Python's numbers become the native code's arguments: what both bindings share. A tensor on its way through
// Python is (address, outer stride in elements, dtype); address 0 is an absent one.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "gaussian_nll.h"
#include "heteroscedastic.h"

namespace vidfast::bindings {

using Address = uintptr_t;

inline void* pointer(Address a) { return reinterpret_cast<void*>(a); }
inline double* doubles(Address a) { return reinterpret_cast<double*>(a); }

inline View view(Address data, int64_t outer_stride, int dtype) {
  return {pointer(data), outer_stride, static_cast<DType>(dtype)};
}

inline Problem problem(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride,
                       int target_dtype, Address alpha, int alpha_dtype, int64_t outer, int64_t channels, int64_t inner,
                       double k, double eps, bool full, Address positions, bool positions_are_bytes, Address totals) {
  Problem p;
  p.outer = outer;
  p.channels = channels;
  p.inner = inner;
  p.mean = view(mean, mean_stride, mean_dtype);
  p.target = view(target, target_stride, target_dtype);
  p.alpha = pointer(alpha);
  p.alpha_dtype = static_cast<DType>(alpha_dtype);
  p.eps = eps;
  p.k = k;
  p.full = full;
  p.positions = pointer(positions);
  p.positions_are_bytes = positions_are_bytes;
  p.totals = doubles(totals);
  return p;
}

inline Total total(Address positions, bool positions_are_bytes, bool positions_are_f64, int64_t count, Address factor,
                   int factor_dtype, double k, int64_t channels) {
  return {pointer(positions),
          positions_are_bytes,
          positions_are_f64,
          count,
          pointer(factor),
          static_cast<DType>(factor_dtype),
          k,
          channels};
}

// In the order of vidfast/heteroscedastic/native.py.
inline HeteroscedasticProblem heteroscedastic_problem(Address mean, int64_t mean_stride, int mean_dtype, Address target,
                                                      int64_t target_stride, int target_dtype, Address raw,
                                                      int64_t raw_stride, int raw_dtype, int64_t outer, int64_t row,
                                                      int transform, double eps, double beta, double k, bool full,
                                                      bool negative_is_nan, int64_t channels, int64_t inner,
                                                      Address positions, bool positions_are_bytes, Address totals) {
  HeteroscedasticProblem p;
  p.outer = outer;
  p.row = row;
  p.mean = view(mean, mean_stride, mean_dtype);
  p.target = view(target, target_stride, target_dtype);
  p.raw = view(raw, raw_stride, raw_dtype);
  p.transform = static_cast<Transform>(transform);
  p.eps = eps;
  p.beta = beta;
  p.k = k;
  p.full = full;
  p.negative_is_nan = negative_is_nan;
  p.channels = channels;
  p.inner = inner;
  p.positions = pointer(positions);
  p.positions_are_bytes = positions_are_bytes;
  p.totals = doubles(totals);
  return p;
}

}  // namespace vidfast::bindings

// Adds the CUDA part to the module; in builds with CUDA.
void bind_cuda(pybind11::module_& m);
