#include "io/fault_hook.h"

#include "bindings/register.h"

namespace py = pybind11;

namespace weightload {

void register_fault_hook(py::module_& module) {
  using fault_hook::Fault;
  py::module_ hook = module.def_submodule("fault_hook", "Injected I/O failures, for tests.");
  py::enum_<Fault>(hook, "Fault")
      .value("error", Fault::error)
      .value("interrupt", Fault::interrupt)
      .value("short_read", Fault::short_read)
      .value("end_of_file", Fault::end_of_file)
      .value("delay", Fault::delay);
  hook.def(
      "arm",
      [](Fault fault, uint64_t first, uint64_t count, int error_number, int64_t delay_ms) {
        fault_hook::arm({fault, first, count, error_number, std::chrono::milliseconds(delay_ms)});
      },
      py::arg("fault"), py::arg("first") = 0, py::arg("count") = 1, py::arg("error_number") = 0,
      py::arg("delay_ms") = 0,
      "Makes `count` reads from the `first`-th on (counted from 0 since this call) suffer the fault.");
  hook.def("disarm", &fault_hook::disarm);
  hook.def("calls", &fault_hook::calls_since_armed, "reads since arm()");
}

}  // namespace weightload
