#include <pybind11/pybind11.h>

#include "bindings/gil.h"
#include "bindings/register.h"
#include "memory/spare_memory.h"

namespace py = pybind11;

namespace weightload {

void register_kept_memory(py::module_& module) {
  module.def(
      "release_memory",
      [] {
        const ReleaseGil release(AtExit::go_on);
        return spare_memory::release();
      },
      "Gives the memory that is kept for later loads back to the system, and returns its bytes.");
}

}  // namespace weightload
