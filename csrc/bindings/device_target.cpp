#include "bindings/device_target.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bindings/gil.h"
#include "bindings/register.h"

namespace py = pybind11;

namespace weightload {

void register_device_target(py::module_& module) {
  py::class_<DeviceTarget> made(module, "DeviceTarget",
                                "An accelerator to load to; page-locking of its ring begins with construction.");
  made.def(py::init([](const std::string& device, size_t slots, uint64_t slot_bytes, size_t enough,
                       std::optional<std::pair<size_t, uint64_t>> cold) {
             std::optional<OtherSlots> others;
             if (cold) others = OtherSlots{cold->first, cold->second};
             const ReleaseGil release;
             return std::make_unique<DeviceTarget>(device, slots, slot_bytes, enough, others);
           }),
           py::arg("device"), py::arg("slots"), py::arg("slot_bytes"), py::arg("enough"), py::arg("cold"),
           "``slots``: at most; more than ``enough`` only where the device is late. ``cold``: slots and their bytes in "
           "place of these, where what is to be read is not in the page cache.")
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
