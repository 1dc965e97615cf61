// The CUDA part of vidfast._C for the loss with one variance an element.
#include "bindings.h"

namespace py = pybind11;
using vidfast::DType;
using namespace vidfast::bindings;

namespace {

void forward(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride, int target_dtype,
             Address raw, int64_t raw_stride, int raw_dtype, int64_t outer, int64_t row, int transform, double eps,
             double beta, double k, bool full, bool negative_is_nan, int64_t channels, int64_t inner, Address positions,
             bool positions_are_bytes, Address totals, Address loss, int loss_dtype, Address workspace,
             Address stream) {
  py::gil_scoped_release release;
  vidfast::cuda::heteroscedastic_forward(
      heteroscedastic_problem(mean, mean_stride, mean_dtype, target, target_stride, target_dtype, raw, raw_stride,
                              raw_dtype, outer, row, transform, eps, beta, k, full, negative_is_nan, channels, inner,
                              positions, positions_are_bytes, totals),
      pointer(loss), static_cast<DType>(loss_dtype), pointer(workspace), pointer(stream));
}

void forward_grad(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride,
                  int target_dtype, Address raw, int64_t raw_stride, int raw_dtype, int64_t outer, int64_t row,
                  int transform, double eps, double beta, double k, bool full, bool negative_is_nan, int64_t channels,
                  int64_t inner, Address positions, bool positions_are_bytes, Address totals, Address loss,
                  int loss_dtype, Address grad_mean, int64_t grad_mean_stride, Address grad_raw,
                  int64_t grad_raw_stride, Address workspace, Address stream) {
  py::gil_scoped_release release;
  vidfast::cuda::heteroscedastic_forward_grad(
      heteroscedastic_problem(mean, mean_stride, mean_dtype, target, target_stride, target_dtype, raw, raw_stride,
                              raw_dtype, outer, row, transform, eps, beta, k, full, negative_is_nan, channels, inner,
                              positions, positions_are_bytes, totals),
      pointer(loss), static_cast<DType>(loss_dtype), view(grad_mean, grad_mean_stride, mean_dtype),
      view(grad_raw, grad_raw_stride, raw_dtype), pointer(workspace), pointer(stream));
}

void backward(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride,
              int target_dtype, Address raw, int64_t raw_stride, int raw_dtype, int64_t outer, int64_t row,
              int transform, double eps, double beta, double k, bool full, bool negative_is_nan, int64_t channels,
              int64_t inner, Address positions, bool positions_are_bytes, Address totals, Address g, int g_dtype,
              Address grad_mean, int64_t grad_mean_stride, Address grad_target, int64_t grad_target_stride,
              Address grad_raw, int64_t grad_raw_stride, Address stream) {
  py::gil_scoped_release release;
  vidfast::cuda::heteroscedastic_backward(
      heteroscedastic_problem(mean, mean_stride, mean_dtype, target, target_stride, target_dtype, raw, raw_stride,
                              raw_dtype, outer, row, transform, eps, beta, k, full, negative_is_nan, channels, inner,
                              positions, positions_are_bytes, totals),
      pointer(g), static_cast<DType>(g_dtype), view(grad_mean, grad_mean_stride, mean_dtype),
      view(grad_target, grad_target_stride, target_dtype), view(grad_raw, grad_raw_stride, raw_dtype), pointer(stream));
}

int64_t workspace_bytes(int64_t outer, int64_t row, int mean_dtype, int target_dtype, int raw_dtype) {
  return vidfast::cuda::heteroscedastic_workspace_bytes(
      outer, row, static_cast<DType>(mean_dtype), static_cast<DType>(target_dtype), static_cast<DType>(raw_dtype));
}

}  // namespace

void bind_cuda_heteroscedastic(py::module_& m) {
  m.def("cuda_heteroscedastic_forward", &forward);
  m.def("cuda_heteroscedastic_forward_grad", &forward_grad);
  m.def("cuda_heteroscedastic_backward", &backward);
  m.def("cuda_heteroscedastic_workspace_bytes", &workspace_bytes);
}
