// The CUDA back end's functions over host memory, as a Python module.
#include <dlfcn.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include "emulation.h"

namespace py = pybind11;

void bind_cuda(py::module_& m);

PYBIND11_MODULE(vidfast_emulated, m) {
  m.doc() = "The CUDA kernels of vidfast, run on the host.";
  bind_cuda(m);
  m.attr("sources") = VIDFAST_SOURCES;
  py::class_<emulation::Launch>(m, "Launch")
      .def_property_readonly("offset",  // of the kernel in this library, as in its table of symbols
                             [](const emulation::Launch& self) {
                               Dl_info library{};
                               dladdr(self.kernel, &library);
                               return static_cast<const char*>(self.kernel) -
                                      static_cast<const char*>(library.dli_fbase);
                             })
      .def_property_readonly(
          "grid", [](const emulation::Launch& self) { return py::make_tuple(self.grid.x, self.grid.y, self.grid.z); })
      .def_readonly("threads", &emulation::Launch::threads)
      .def_readonly("shared", &emulation::Launch::shared)
      .def_readonly("overlap", &emulation::Launch::overlap)
      .def_property_readonly("arguments", [](const emulation::Launch& self) { return py::bytes(self.arguments); });
  py::class_<emulation::Machine>(m, "Machine")
      .def_readwrite("seed", &emulation::Machine::seed)
      .def_readwrite("device", &emulation::Machine::device)
      .def_readwrite("processors", &emulation::Machine::processors)
      .def_readwrite("resident", &emulation::Machine::resident)
      .def_readwrite("launches", &emulation::Machine::launches)
      .def_readwrite("memsets", &emulation::Machine::memsets)
      .def_readwrite("instead", &emulation::Machine::instead)
      .def("fail_launches",
           [](emulation::Machine& self, int error) { self.launch_fault = static_cast<cudaError_t>(error); })
      .def("fail", [](emulation::Machine& self, int error) { self.fault = static_cast<cudaError_t>(error); });
  m.def("machine", &emulation::machine, py::return_value_policy::reference);
}
