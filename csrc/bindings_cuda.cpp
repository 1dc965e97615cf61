// The CUDA part of vidfast._C. Addresses are integers, the stream is a cudaStream_t's.
#include "bindings.h"
#include "gaussian_nll.h"
#ifdef VIDFAST_TUNE
#include "cuda/chunks.h"
#endif

namespace py = pybind11;
using vidfast::DType;
using namespace vidfast::bindings;

namespace {

void cuda_forward(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride,
                  int target_dtype, Address alpha, int alpha_dtype, int64_t outer, int64_t channels, int64_t inner,
                  double k, double eps, bool full, Address positions, bool positions_are_bytes, Address totals,
                  Address loss, int loss_dtype, Address sum_sq, Address workspace, Address stream) {
  py::gil_scoped_release release;
  vidfast::cuda::forward(problem(mean, mean_stride, mean_dtype, target, target_stride, target_dtype, alpha, alpha_dtype,
                                 outer, channels, inner, k, eps, full, positions, positions_are_bytes, totals),
                         pointer(loss), static_cast<DType>(loss_dtype), doubles(sum_sq), pointer(workspace),
                         pointer(stream));
}

void cuda_forward_grad(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride,
                       int target_dtype, Address alpha, int alpha_dtype, int64_t outer, int64_t channels, int64_t inner,
                       double k, double eps, bool full, Address positions, bool positions_are_bytes, Address totals,
                       Address loss, int loss_dtype, Address grad_mean, int64_t grad_stride, Address grad_alpha,
                       Address workspace, Address stream) {
  py::gil_scoped_release release;
  vidfast::cuda::forward_grad(
      problem(mean, mean_stride, mean_dtype, target, target_stride, target_dtype, alpha, alpha_dtype, outer, channels,
              inner, k, eps, full, positions, positions_are_bytes, totals),
      pointer(loss), static_cast<DType>(loss_dtype), view(grad_mean, grad_stride, mean_dtype), doubles(grad_alpha),
      pointer(workspace), pointer(stream));
}

void cuda_backward(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride,
                   int target_dtype, Address alpha, int alpha_dtype, int64_t outer, int64_t channels, int64_t inner,
                   double k, double eps, bool full, Address positions, bool positions_are_bytes, Address totals,
                   Address g, int g_dtype, Address sum_sq, Address grad_mean, int64_t grad_mean_stride,
                   Address grad_target, int64_t grad_target_stride, Address grad_alpha, Address stream) {
  py::gil_scoped_release release;
  vidfast::cuda::backward(
      problem(mean, mean_stride, mean_dtype, target, target_stride, target_dtype, alpha, alpha_dtype, outer, channels,
              inner, k, eps, full, positions, positions_are_bytes, totals),
      pointer(g), static_cast<DType>(g_dtype), doubles(sum_sq), view(grad_mean, grad_mean_stride, mean_dtype),
      view(grad_target, grad_target_stride, target_dtype), pointer(grad_alpha), pointer(stream));
}

void cuda_total(Address positions, bool positions_are_bytes, bool positions_are_f64, int64_t count, Address factor,
                int factor_dtype, double k, int64_t channels, Address totals, Address workspace, Address stream) {
  py::gil_scoped_release release;
  vidfast::cuda::total(
      total(positions, positions_are_bytes, positions_are_f64, count, factor, factor_dtype, k, channels),
      doubles(totals), pointer(workspace), pointer(stream));
}

void cuda_scale(Address g, int g_dtype, int64_t outer, int64_t row, Address source, int64_t source_stride,
                Address result, int64_t result_stride, int dtype, int64_t channels, Address grad_alpha,
                Address grad_alpha_out, int alpha_dtype, Address stream) {
  py::gil_scoped_release release;
  vidfast::cuda::scale(pointer(g), static_cast<DType>(g_dtype), outer, row, view(source, source_stride, dtype),
                       view(result, result_stride, dtype), channels, doubles(grad_alpha), pointer(grad_alpha_out),
                       static_cast<DType>(alpha_dtype), pointer(stream));
}

int64_t cuda_workspace_bytes(int64_t outer, int64_t channels, int64_t inner, int64_t mean_stride, int64_t target_stride,
                             int mean_dtype, int target_dtype) {
  return vidfast::cuda::workspace_bytes(outer, channels, inner, mean_stride, target_stride,
                                        static_cast<DType>(mean_dtype), static_cast<DType>(target_dtype));
}

#ifdef VIDFAST_TUNE
struct FreeNumber {
  const char* name;
  int64_t* value;
  int64_t least = 1;
};

const FreeNumber* free_numbers() {
  using namespace vidfast::cuda;
  static const FreeNumber all[] = {
      {"kPlane", &kPlane},
      {"kFewestVectors", &kFewestVectors},
      {"kMostVectors", &kMostVectors},
      {"kChunks", &kChunks},
      {"kFewestRows", &kFewestRows},
      {"kMostRows", &kMostRows},
      {"kBlocks", &kBlocks},
      {"kAlone", &kAlone},
      {"kShare", &kShare},
      {"kOverlap", &kOverlap, 0},
      {"kPrefetch", &kPrefetch, 0},
      {nullptr, nullptr},
  };
  return all;
}

py::dict cuda_free_numbers() {
  py::dict found;
  for (const FreeNumber* n = free_numbers(); n->name != nullptr; ++n) found[n->name] = *n->value;
  return found;
}

void cuda_set_free_number(const std::string& name, int64_t value) {
  for (const FreeNumber* n = free_numbers(); n->name != nullptr; ++n) {
    if (name != n->name) continue;
    if (value < n->least)
      throw py::value_error(name + " must be at least " + std::to_string(n->least) + ", got " + std::to_string(value));
    *n->value = value;
    return;
  }
  std::string names;
  for (const FreeNumber* n = free_numbers(); n->name != nullptr; ++n) names += std::string(n->name) + ", ";
  throw py::value_error("name must be one of " + names + "got " + name);
}
#endif

}  // namespace

void bind_cuda_heteroscedastic(py::module_& m);

void bind_cuda(py::module_& m) {
  bind_cuda_heteroscedastic(m);
#ifdef VIDFAST_TUNE
  m.def("cuda_free_numbers", &cuda_free_numbers, "The free numbers of csrc/cuda/chunks.h by name, as they are now.");
  m.def("cuda_set_free_number", &cuda_set_free_number);
#endif
  m.def("cuda_forward", &cuda_forward);
  m.def("cuda_forward_grad", &cuda_forward_grad);
  m.def("cuda_backward", &cuda_backward);
  m.def("cuda_total", &cuda_total);
  m.def("cuda_total_workspace_bytes", &vidfast::cuda::total_workspace_bytes);
  m.def("cuda_scale", &cuda_scale);
  m.def("cuda_workspace_bytes", &cuda_workspace_bytes);
  m.def("cuda_unavailable", &vidfast::cuda::unavailable, "Why no CUDA device can be used, or ''.");
  m.def("cuda_device_unsupported", &vidfast::cuda::device_unsupported,
        "Why the current device cannot run this, or ''.");
  m.def("cuda_architectures", &vidfast::cuda::architectures, "The architectures that the kernels were built for.");
  m.def("cuda_runtime_version", &vidfast::cuda::runtime_version);
  m.def("cuda_driver_version", &vidfast::cuda::driver_version);
}
