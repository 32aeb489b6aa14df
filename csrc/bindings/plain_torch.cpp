#include "device/plain_torch.h"

#include <pybind11/typing.h>

#include "bindings/gil.h"
#include "bindings/register.h"

namespace py = pybind11;

namespace weightload {

void register_plain_torch(py::module_& module) {
  // A call, not a context manager: no exception, a signal handler's included, can come between it and its end.
  module.def(
      "plainly",
      [](const py::object& function, const py::typing::Tuple<py::object, py::ellipsis>& arguments,
         const py::typing::Dict<py::str, py::object>& options) {
        const Inside inside;
        const PlainTorch plain;
        PyObject* const result = PyObject_Call(function.ptr(), arguments.ptr(), options.ptr());
        if (!result) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
      },
      py::arg("function"), py::arg("arguments"), py::arg("options"),
      "function(*arguments, **options), with torch as it is in a new thread: without the caller's modes.");
}

}  // namespace weightload
