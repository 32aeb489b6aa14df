#include <chrono>
#include <map>
#include <string>

#include "base/start_thread.h"
#include "bindings/register.h"
#include "file/fault_hook.h"
#include "memory/page_prices.h"

namespace py = pybind11;

namespace weightload {
namespace {

void arm(const std::string& fault, uint64_t first, uint64_t count, int error_number, int64_t delay_ms, bool statuses) {
  using fault_hook::Fault;
  static const std::map<std::string, Fault> kFaults = {{"error", Fault::error},
                                                       {"interrupt", Fault::interrupt},
                                                       {"short_read", Fault::short_read},
                                                       {"end_of_file", Fault::end_of_file},
                                                       {"delay", Fault::delay}};
  const auto found = kFaults.find(fault);
  if (found == kFaults.end()) throw py::value_error("no such fault: " + fault);
  fault_hook::arm({found->second, first, count, error_number, std::chrono::milliseconds(delay_ms),
                   statuses ? fault_hook::Calls::statuses : fault_hook::Calls::reads});
}

}  // namespace

void register_fault_hook(py::module_& module) {
  module.def("arm_fault", &arm, py::arg("fault"), py::arg("first") = 0, py::arg("count") = 1,
             py::arg("error_number") = 0, py::arg("delay_ms") = 0, py::arg("statuses") = false,
             "For tests: makes `count` reads from the `first`-th on (counted from 0 since this call) suffer "
             "the fault: error, interrupt, short_read, end_of_file or delay. Or `statuses`: what asks for a file's.");
  module.def("disarm_fault", &fault_hook::disarm);
  module.def("reads_since_armed", &fault_hook::calls_since_armed, "Or statuses.");
  module.def(
      "set_page_costs",
      [](int64_t huge_us, int64_t single_us) {
        set_page_costs(std::chrono::microseconds(huge_us), std::chrono::microseconds(single_us));
      },
      py::arg("huge_us"), py::arg("single_us"),
      "For tests: loads take fresh memory of 2 MiB to cost so much in a huge page or in single ones, whatever it "
      "does.");
  module.def("measure_page_costs", &measure_page_costs);
  module.def(
      "refuse_threads", [](bool refuse) { threads_refused() = refuse; }, py::arg("refuse"),
      "For tests: as if the system had no thread to give.");
}

}  // namespace weightload
