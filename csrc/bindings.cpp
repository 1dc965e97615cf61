// vidfast._C: the native primitives for Python. Addresses are integers; the caller answers for what is there.
#include "bindings.h"

#include "cpu/blocks.h"
#include "gaussian_nll.h"

namespace py = pybind11;
using vidfast::DType;
using namespace vidfast::bindings;

namespace {

void cpu_forward(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride,
                 int target_dtype, Address alpha, int alpha_dtype, int64_t outer, int64_t channels, int64_t inner,
                 double k, double eps, bool full, Address loss, int loss_dtype, Address sum_sq, int threads) {
  py::gil_scoped_release release;
  vidfast::cpu::forward(problem(mean, mean_stride, mean_dtype, target, target_stride, target_dtype, alpha, alpha_dtype,
                                outer, channels, inner, k, eps, full),
                        pointer(loss), static_cast<DType>(loss_dtype), doubles(sum_sq), threads);
}

void cpu_forward_grad(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride,
                      int target_dtype, Address alpha, int alpha_dtype, int64_t outer, int64_t channels, int64_t inner,
                      double k, double eps, bool full, Address loss, int loss_dtype, Address grad_mean,
                      int64_t grad_stride, Address grad_alpha, int threads) {
  py::gil_scoped_release release;
  vidfast::cpu::forward_grad(problem(mean, mean_stride, mean_dtype, target, target_stride, target_dtype, alpha,
                                     alpha_dtype, outer, channels, inner, k, eps, full),
                             pointer(loss), static_cast<DType>(loss_dtype), view(grad_mean, grad_stride, mean_dtype),
                             doubles(grad_alpha), threads);
}

void cpu_backward(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride,
                  int target_dtype, Address alpha, int alpha_dtype, int64_t outer, int64_t channels, int64_t inner,
                  double k, double eps, bool full, Address g, int g_dtype, Address sum_sq, Address grad_mean,
                  int64_t grad_mean_stride, Address grad_target, int64_t grad_target_stride, Address grad_alpha,
                  int threads) {
  py::gil_scoped_release release;
  vidfast::cpu::backward(problem(mean, mean_stride, mean_dtype, target, target_stride, target_dtype, alpha, alpha_dtype,
                                 outer, channels, inner, k, eps, full),
                         pointer(g), static_cast<DType>(g_dtype), doubles(sum_sq),
                         view(grad_mean, grad_mean_stride, mean_dtype),
                         view(grad_target, grad_target_stride, target_dtype), pointer(grad_alpha), threads);
}

void cpu_scale(Address g, int g_dtype, int64_t outer, int64_t row, Address src, int64_t src_stride, Address dst,
               int64_t dst_stride, int dtype, int64_t channels, Address grad_alpha, Address grad_alpha_out,
               int alpha_dtype, int threads) {
  py::gil_scoped_release release;
  vidfast::cpu::scale(pointer(g), static_cast<DType>(g_dtype), outer, row, view(src, src_stride, dtype),
                      view(dst, dst_stride, dtype), channels, doubles(grad_alpha), pointer(grad_alpha_out),
                      static_cast<DType>(alpha_dtype), threads);
}

void cpu_rectify(Address x, int dtype, int rounded, bool positive, int64_t n, int threads) {
  py::gil_scoped_release release;
  vidfast::cpu::rectify(pointer(x), static_cast<DType>(dtype), static_cast<DType>(rounded), positive, n, threads);
}

void cpu_rectify_backward(Address gradient, Address activation, Address out, int dtype, int rounded, int64_t n,
                          int threads) {
  py::gil_scoped_release release;
  vidfast::cpu::rectify_backward(pointer(gradient), pointer(activation), pointer(out), static_cast<DType>(dtype),
                                 static_cast<DType>(rounded), n, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "vidfast's native kernels. Arguments are raw addresses; use the vidfast package instead.";
  m.def("cpu_forward", &cpu_forward);
  m.def("cpu_forward_grad", &cpu_forward_grad);
  m.def("cpu_backward", &cpu_backward);
  m.def("cpu_scale", &cpu_scale);
  m.def("cpu_rectify", &cpu_rectify);
  m.def("cpu_rectify_backward", &cpu_rectify_backward);
  using vidfast::cpu::Block;
  py::class_<Block>(m, "CpuBlock", py::buffer_protocol(), py::module_local(),
                    "Memory of `nbytes` bytes, kept for the next when freed.")
      .def(py::init<int64_t>(), py::arg("nbytes"))
      .def_buffer([](Block& b) { return py::buffer_info(static_cast<uint8_t*>(b.data()), b.bytes()); });
  m.def(
      "cpu_block_bytes",
      [] {
        const vidfast::cpu::BlockBytes b = vidfast::cpu::block_bytes();
        return py::make_tuple(b.in_use, b.idle, b.most);
      },
      "(in use, idle, the most in use at once), in bytes.");
  m.def("cpu_release_idle_blocks", &vidfast::cpu::release_idle_blocks, "Give idle blocks back to the system.");
  m.def("cpu_isa", &vidfast::cpu::isa, "The instruction set in use: baseline, avx2 or avx512.");
  m.def("cpu_select_isa", &vidfast::cpu::select_isa, py::arg("name"),
        "Switch to another instruction set; False if this processor lacks it.");
  m.def("cpu_openmp_runtime", &vidfast::cpu::openmp_runtime, "The OpenMP runtime whose threads are used.");
#ifdef VIDFAST_CUDA
  bind_cuda(m);
#endif
  m.attr("version") = VIDFAST_VERSION;
  m.attr("sources") = VIDFAST_SOURCES;
}
