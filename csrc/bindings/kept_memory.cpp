#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/gil.h"
#include "bindings/register.h"
#include "memory/spare_memory.h"

namespace py = pybind11;

namespace weightload {

void register_kept_memory(py::module_& module) {
  module.def(
      "keep_memory",
      [](uint64_t most) {
        const ReleaseGil release;
        spare_memory::set_limit(most);
      },
      py::arg("most"), "From now on the process keeps at most so many bytes for later loads.");
  module.def(
      "release_memory",
      [] {
        const ReleaseGil release(AtExit::go_on);
        return spare_memory::release();
      },
      "Gives the memory that is kept for later loads back to the system, and returns its bytes.");
}

}  // namespace weightload
