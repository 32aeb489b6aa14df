#include "bindings/byte_tap.h"

#include <utility>

#include "bindings/failed_read.h"
#include "bindings/gil.h"

namespace py = pybind11;

namespace weightload {

PythonTap::PythonTap(py::object object, std::string path) : object_(std::move(object)), path_(std::move(path)) {}

// As RemoteSource's.
PythonTap::~PythonTap() {
  if (interpreter_is_ending()) {
    static_cast<void>(object_.release());
    return;
  }
  const py::gil_scoped_acquire acquire;
  object_ = {};
}

void PythonTap::take(uint64_t offset, const char* bytes, size_t count) const {
  const py::gil_scoped_acquire acquire;
  try {
    object_.attr("take")(offset,
                         py::memoryview::from_memory(static_cast<const void*>(bytes), static_cast<py::ssize_t>(count)));
  } catch (py::error_already_set& error) {
    fail_read(error, path_, offset);
  }
}

void PythonTap::leave() const {
  const py::gil_scoped_acquire acquire;
  object_.attr("leave")();
}

}  // namespace weightload
