#include <pybind11/pybind11.h>

#include "bindings/register.h"

namespace py = pybind11;

namespace weightload {
namespace {

// In the main thread, between two of its bytecodes: the caller's. Takes over the exception.
int raise_now(void* exception) {
  auto* const error = static_cast<PyObject*>(exception);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
  Py_DECREF(error);
  return -1;
}

// A bar that cannot be written, or that was never made whole, and not what a signal handler raised.
bool is_of_the_bar(const py::error_already_set& error) {
  if (!error.matches(PyExc_Exception)) return false;
  if (error.trace()) PyException_SetTraceback(error.value().ptr(), error.trace().ptr());
  try {
    py::module_::import("weightload._base.handlers").attr("pass_on")(error.value());
  } catch (const py::error_already_set&) {
    return false;
  }
  return true;
}

// Calls `self.close()` for a finaliser, whose exceptions Python can only report as ignored. That of a signal handler,
// which may run in any Python code, is raised a moment later instead. What else can happen to a bar is that it cannot
// be written.
void finish(const py::object& self) {
  const py::error_scope outer;  // an exception may be on its way while objects go
  try {
    self.attr("close")();
  } catch (py::error_already_set& error) {
    if (is_of_the_bar(error)) return;
    const py::object exception = error.value();
    if (Py_AddPendingCall(&raise_now, exception.inc_ref().ptr()) != 0) exception.dec_ref();
  }
}

}  // namespace

void register_finaliser(py::module_& module) {
  const py::cpp_function function(&finish, py::name("finish"), py::scope(module), py::arg("self"),
                                  "As the __del__ of a class: close(), whose exceptions reach the caller.");
  module.attr("finish") = py::reinterpret_steal<py::object>(PyInstanceMethod_New(function.ptr()));
}

}  // namespace weightload
