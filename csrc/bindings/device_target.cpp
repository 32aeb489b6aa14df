#include "bindings/device_target.h"

#include <pybind11/stl.h>

#include "bindings/gil.h"
#include "bindings/register.h"

namespace py = pybind11;

namespace weightload {

void register_device_target(py::module_& module) {
  py::class_<DeviceTarget> made(module, "DeviceTarget",
                                "An accelerator to load to; page-locking of its ring begins with construction.");
  made.def(py::init<const std::string&, size_t, uint64_t, size_t>(), py::call_guard<ReleaseGil>(), py::arg("device"),
           py::arg("slots"), py::arg("slot_bytes"), py::arg("enough"),
           "``slots``: at most; more than ``enough`` only where the device is late.")
      .def(
          "close",
          [](DeviceTarget& target) {
            const ReleaseGil release(AtExit::go_on);
            target.close();
          },
          "Gives the ring back, for a target that no loader was made with.");
  refuse_copies(made);
}

}  // namespace weightload
