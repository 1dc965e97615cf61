// vidfast._C: the native primitives for Python. Addresses are integers; the caller answers for what is there.
#include "bindings.h"

#include <pybind11/stl.h>

#include "cpu/blocks.h"
#include "gaussian_nll.h"
#include "head.h"

namespace py = pybind11;
using vidfast::DType;
using namespace vidfast::bindings;

namespace {

void cpu_forward(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride,
                 int target_dtype, Address alpha, int alpha_dtype, int64_t outer, int64_t channels, int64_t inner,
                 double k, double eps, bool full, Address positions, bool positions_are_bytes, Address totals,
                 Address loss, int loss_dtype, Address sum_sq, int threads) {
  py::gil_scoped_release release;
  vidfast::cpu::forward(problem(mean, mean_stride, mean_dtype, target, target_stride, target_dtype, alpha, alpha_dtype,
                                outer, channels, inner, k, eps, full, positions, positions_are_bytes, totals),
                        pointer(loss), static_cast<DType>(loss_dtype), doubles(sum_sq), threads);
}

void cpu_forward_grad(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride,
                      int target_dtype, Address alpha, int alpha_dtype, int64_t outer, int64_t channels, int64_t inner,
                      double k, double eps, bool full, Address positions, bool positions_are_bytes, Address totals,
                      Address loss, int loss_dtype, Address grad_mean, int64_t grad_stride, Address grad_alpha,
                      int threads) {
  py::gil_scoped_release release;
  vidfast::cpu::forward_grad(
      problem(mean, mean_stride, mean_dtype, target, target_stride, target_dtype, alpha, alpha_dtype, outer, channels,
              inner, k, eps, full, positions, positions_are_bytes, totals),
      pointer(loss), static_cast<DType>(loss_dtype), view(grad_mean, grad_stride, mean_dtype), doubles(grad_alpha),
      threads);
}

void cpu_backward(Address mean, int64_t mean_stride, int mean_dtype, Address target, int64_t target_stride,
                  int target_dtype, Address alpha, int alpha_dtype, int64_t outer, int64_t channels, int64_t inner,
                  double k, double eps, bool full, Address positions, bool positions_are_bytes, Address totals,
                  Address g, int g_dtype, Address sum_sq, Address grad_mean, int64_t grad_mean_stride,
                  Address grad_target, int64_t grad_target_stride, Address grad_alpha, int threads) {
  py::gil_scoped_release release;
  vidfast::cpu::backward(problem(mean, mean_stride, mean_dtype, target, target_stride, target_dtype, alpha, alpha_dtype,
                                 outer, channels, inner, k, eps, full, positions, positions_are_bytes, totals),
                         pointer(g), static_cast<DType>(g_dtype), doubles(sum_sq),
                         view(grad_mean, grad_mean_stride, mean_dtype),
                         view(grad_target, grad_target_stride, target_dtype), pointer(grad_alpha), threads);
}

void cpu_total(Address positions, bool positions_are_bytes, bool positions_are_f64, int64_t count, Address factor,
               int factor_dtype, double k, int64_t channels, Address totals, int threads) {
  py::gil_scoped_release release;
  vidfast::cpu::total(
      total(positions, positions_are_bytes, positions_are_f64, count, factor, factor_dtype, k, channels),
      doubles(totals), threads);
}

// The arguments of `heteroscedastic_problem`.
using HeteroscedasticTuple =
    std::tuple<Address, int64_t, int, Address, int64_t, int, Address, int64_t, int, int64_t, int64_t, int, double,
               double, double, bool, bool, int64_t, int64_t, Address, bool, Address>;

vidfast::HeteroscedasticProblem problem_of(const HeteroscedasticTuple& t) {
  return std::apply(heteroscedastic_problem, t);
}

vidfast::View like(const vidfast::View& v, Address data, int64_t stride) { return {pointer(data), stride, v.dtype}; }

void cpu_heteroscedastic_forward(const HeteroscedasticTuple& t, Address loss, int loss_dtype, int threads) {
  py::gil_scoped_release release;
  vidfast::cpu::heteroscedastic_forward(problem_of(t), pointer(loss), static_cast<DType>(loss_dtype), threads);
}

void cpu_heteroscedastic_forward_grad(const HeteroscedasticTuple& t, Address loss, int loss_dtype, Address grad_mean,
                                      int64_t grad_mean_stride, Address grad_raw, int64_t grad_raw_stride,
                                      int threads) {
  py::gil_scoped_release release;
  const vidfast::HeteroscedasticProblem p = problem_of(t);
  vidfast::cpu::heteroscedastic_forward_grad(p, pointer(loss), static_cast<DType>(loss_dtype),
                                             like(p.mean, grad_mean, grad_mean_stride),
                                             like(p.raw, grad_raw, grad_raw_stride), threads);
}

void cpu_heteroscedastic_backward(const HeteroscedasticTuple& t, Address g, int g_dtype, Address grad_mean,
                                  int64_t grad_mean_stride, Address grad_target, int64_t grad_target_stride,
                                  Address grad_raw, int64_t grad_raw_stride, int threads) {
  py::gil_scoped_release release;
  const vidfast::HeteroscedasticProblem p = problem_of(t);
  vidfast::cpu::heteroscedastic_backward(
      p, pointer(g), static_cast<DType>(g_dtype), like(p.mean, grad_mean, grad_mean_stride),
      like(p.target, grad_target, grad_target_stride), like(p.raw, grad_raw, grad_raw_stride), threads);
}

void cpu_vector_function(const std::string& name, bool f64, Address from, Address to, int64_t n) {
  if (!vidfast::cpu::vector_function(name.c_str(), f64, pointer(from), pointer(to), n))
    throw py::value_error("name must be that of a vector function, got " + name);
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

// (address, dtype, batch stride, channel stride, position stride)
using FeatureTuple = std::tuple<Address, int, int64_t, int64_t, int64_t>;
// (weight, its dtype, bias, its dtype, into, out, the weight's gradient, the bias's)
using LayerTuple = std::tuple<Address, int, Address, int, int64_t, int64_t, Address, Address>;

vidfast::Feature feature(const FeatureTuple& t) {
  return {pointer(std::get<0>(t)), static_cast<DType>(std::get<1>(t)), std::get<2>(t), std::get<3>(t), std::get<4>(t)};
}

vidfast::HeadProblem head_problem(int64_t batch, int64_t channels, int64_t positions, const FeatureTuple& student,
                                  const FeatureTuple& target, const std::vector<LayerTuple>& layers, Address alpha,
                                  int alpha_dtype, double eps, double k, int module, const FeatureTuple& grad_student,
                                  Address grad_alpha, Address weights, bool weights_are_bytes, double values) {
  vidfast::HeadProblem p{};
  p.kernels = vidfast::cpu::head_kernels(static_cast<DType>(module));
  if (p.kernels == nullptr) throw std::runtime_error("the instruction set in use has no kernel for such a head");
  p.batch = batch, p.channels = channels, p.positions = positions;
  p.student = feature(student), p.target = feature(target), p.grad_student = feature(grad_student);
  if (layers.empty() || layers.size() > vidfast::kMostLayers)
    throw std::invalid_argument("a head must have 1 to " + std::to_string(vidfast::kMostLayers) + " layers, got " +
                                std::to_string(layers.size()));
  p.layer_count = static_cast<int>(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& [weight, weight_dtype, bias, bias_dtype, into, out, grad_weight, grad_bias] = layers[i];
    p.layers[i] = {pointer(weight),
                   static_cast<DType>(weight_dtype),
                   pointer(bias),
                   static_cast<DType>(bias_dtype),
                   into,
                   out,
                   static_cast<float*>(pointer(grad_weight)),
                   static_cast<float*>(pointer(grad_bias))};
  }
  p.alpha = pointer(alpha), p.alpha_dtype = static_cast<DType>(alpha_dtype);
  p.eps = eps, p.k = k, p.module = static_cast<DType>(module);
  p.grad_alpha = doubles(grad_alpha);
  p.weights = pointer(weights), p.weights_are_bytes = weights_are_bytes, p.values = values;
  return p;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "vidfast's native kernels. Arguments are raw addresses; use the vidfast package instead.";
  m.def("cpu_forward", &cpu_forward);
  m.def("cpu_forward_grad", &cpu_forward_grad);
  m.def("cpu_backward", &cpu_backward);
  m.def("cpu_total", &cpu_total);
  m.def("cpu_heteroscedastic_forward", &cpu_heteroscedastic_forward);
  m.def("cpu_heteroscedastic_forward_grad", &cpu_heteroscedastic_forward_grad);
  m.def("cpu_heteroscedastic_backward", &cpu_heteroscedastic_backward);
  m.def("cpu_vector_function", &cpu_vector_function,
        "A function of n numbers as the instruction set in use has it, for its tests.");
  m.def("cpu_scale", &cpu_scale);
  m.def("cpu_rectify", &cpu_rectify);
  m.def("cpu_rectify_backward", &cpu_rectify_backward);
  m.def("cpu_head_instructions",
        [](int module, int64_t layers) { return vidfast::cpu::head_instructions(static_cast<DType>(module), layers); });
  py::class_<vidfast::HeadProblem>(m, "CpuHead", py::module_local(), "A head over given addresses.")
      .def(py::init(&head_problem))
      .def("workspace_bytes", &vidfast::cpu::head_workspace_bytes)
      .def("run", [](const vidfast::HeadProblem& p, Address loss, Address workspace, int threads) {
        py::gil_scoped_release release;
        vidfast::cpu::head(p, static_cast<float*>(pointer(loss)), pointer(workspace), threads);
      });
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
  m.def("cpu_isa", &vidfast::cpu::isa, "The instruction set in use: baseline, avx2, avx512 or avx512_bf16.");
  m.def("cpu_select_isa", &vidfast::cpu::select_isa, py::arg("name"),
        "Switch to another instruction set; False if this processor lacks it.");
  m.def("cpu_openmp_runtime", &vidfast::cpu::openmp_runtime, "The OpenMP runtime whose threads are used.");
#ifdef VIDFAST_CUDA
  bind_cuda(m);
#endif
  m.attr("version") = VIDFAST_VERSION;
  m.attr("sources") = VIDFAST_SOURCES;
}
