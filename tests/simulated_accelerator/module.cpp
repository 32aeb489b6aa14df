#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "backend.h"
#include "process_group.h"

namespace py = pybind11;

PYBIND11_MODULE(simulated_accelerator, module) {
  using namespace simulated;
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def("set_available", &set_available);
  module.def("has_context", &has_context);
  module.def("available", &is_available);
  module.def("device_count", [] { return is_available() ? kDevices : 0; });
  module.def("current_device", &current_device);
  module.def("in_forked_child", &in_forked_child);
  module.def("seed_delays", &seed_delays, py::arg("seed"), py::arg("longest_us") = 300);
  module.def("synchronize", &synchronize, unlocked, py::arg("device") = 0);
  module.def("stop_streams", &stop_streams, unlocked);
  module.def("limit_device_memory", &limit_device_memory);
  module.def("live_bytes", &live_bytes, py::arg("device") = 0);
  module.def("peak_bytes", &peak_bytes, py::arg("device") = 0);
  module.def("reset_peak", &reset_peak, py::arg("device") = 0);
  module.def("fail_pinned_after", &fail_pinned_after);
  module.def("shift_pinned", &shift_pinned);
  module.def("pinned_bytes", &pinned_bytes);
  module.def("pinned_made", &pinned_made);
  // Occupies the stream until the matching function that is returned is called.
  module.def("hold_stream", [](int device, int64_t id) {
    auto gate = std::make_shared<Moment>();
    stream(device, id).enqueue([gate] { gate->wait(); });
    return py::cpp_function([gate] { gate->reach(); });
  });
  module.def("communicator_streams", &opened_streams, py::arg("device") = 0);  // ids, for hold_stream
  module.def("empty_cache", &empty_cache, unlocked);
  module.def("make_group", &make_group, unlocked);
  module.def("abort_groups", &abort_groups, unlocked);
}
