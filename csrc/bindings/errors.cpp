#include "base/error.h"

#include <Python.h>

#include "bindings/gil.h"
#include "bindings/register.h"

namespace py = pybind11;

namespace weightload {
namespace {

const char* kind_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::header: return "header";
    case ErrorKind::tensor: return "tensor";
    case ErrorKind::open: return "open";
    case ErrorKind::read: return "read";
    case ErrorKind::memory: return "memory";
    case ErrorKind::device_memory: return "device_memory";
    case ErrorKind::group: return "group";
    case ErrorKind::left: return "left";
    case ErrorKind::checksum: return "checksum";
    case ErrorKind::usage: return "usage";
  }
  return "usage";
}

// Text of the core may hold a path with bytes that are not UTF-8.
py::object to_text(const std::string& bytes) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(bytes.data(), static_cast<Py_ssize_t>(bytes.size())));
}

void translate(std::exception_ptr pointer) {
  if (!pointer) return;
  try {
    std::rethrow_exception(pointer);
  } catch (const Error& error) {
    try {
      const Inside inside;  // Python code: see Note [The interpreter's exit]
      const ErrorContext& where = error.context;
      py::object offset = where.offset ? py::object(py::int_(*where.offset)) : py::none();
      py::object rank = where.rank ? py::object(py::int_(*where.rank)) : py::none();
      py::object exception =
          py::module_::import("weightload.errors")
              .attr("from_core")(kind_name(error.kind), error.rule, to_text(error.what()), to_text(where.path),
                                 to_text(where.tensor), offset, where.error_number, rank);
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
    } catch (py::error_already_set& failed) {
      failed.restore();
    }
  }
}

}  // namespace

void register_errors(py::module_&) { py::register_local_exception_translator(translate); }

}  // namespace weightload
