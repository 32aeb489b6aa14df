#include "bindings/failed_read.h"

#include <utility>

#include "base/error.h"

namespace py = pybind11;

namespace weightload {
namespace {

int errno_of(const py::object& exception) {
  const py::object number = py::getattr(exception, "errno", py::none());
  return py::isinstance<py::int_>(number) ? number.cast<int>() : 0;
}

// What an exception says, without the address and the number that Error adds.
std::string words_of(const py::object& exception, const std::string& path) {
  const py::object reason = py::getattr(exception, "strerror", py::none());
  std::string words = py::str(py::isinstance<py::str>(reason) ? reason : exception);
  const std::string prefix = path + ": ";
  return words.rfind(prefix, 0) == 0 ? words.substr(prefix.size()) : words;
}

}  // namespace

void fail_read(py::error_already_set& error, const std::string& path, uint64_t offset) {
  if (!error.matches(PyExc_Exception)) throw std::move(error);
  const py::object exception = error.value();
  if (error.trace()) PyException_SetTraceback(exception.ptr(), error.trace().ptr());
  py::module_::import("weightload._base.handlers").attr("pass_on")(exception);
  PyException_SetTraceback(exception.ptr(), Py_None);
  throw Error(ErrorKind::read, words_of(exception, path), {path, {}, offset, errno_of(exception)});
}

}  // namespace weightload
