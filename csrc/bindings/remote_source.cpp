#include "bindings/remote_source.h"

#include <chrono>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "bindings/failed_read.h"
#include "bindings/gil.h"
#include "bindings/register.h"
#include "bindings/signals.h"
#include "file/connection.h"

namespace py = pybind11;

namespace weightload {
namespace {

// How long a thread waits for an answer before it looks whether its load has been stopped.
constexpr double kSecondsBetweenLooks = std::chrono::duration<double>(kSignalInterval).count();

constexpr Patience kToConnect{std::chrono::seconds(2), kSignalInterval};

// An answer that has not been read to its end is not wanted.
class Answer {
 public:
  explicit Answer(py::object answer) : answer_(std::move(answer)) {}
  ~Answer() {
    if (!answer_) return;
    try {
      answer_.attr("cancel")();
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("cancelling a request");
    }
  }
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;

  bool wait() const { return answer_.attr("wait")(kSecondsBetweenLooks).cast<bool>(); }
  py::object bytes() {
    const py::object answer = std::exchange(answer_, py::object());
    return answer.attr("bytes")();
  }

 private:
  py::object answer_;
};

class Buffer {
 public:
  explicit Buffer(const py::object& object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  const void* data() const { return view_.buf; }
  size_t size() const { return static_cast<size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

}  // namespace

RemoteSource::RemoteSource(py::object object, std::string path, uint64_t size)
    : object_(std::move(object)), path_(std::move(path)), size_(size) {}

bool RemoteSource::read_directly(uint64_t offset, void* destination, size_t count, const Look& look) const {
  const py::object request = object_.get().attr("begin_direct")(offset, count);
  if (request.is_none()) return false;
  const py::object holder = request.attr("connection");
  Connection& connection = holder.cast<Connection&>();
  const py::bytes text = request.attr("text");
  const double seconds = request.attr("patience").cast<double>();
  const Patience patience{std::chrono::milliseconds(static_cast<int64_t>(1000 * seconds)), kSignalInterval};
  const auto without_gil = [&](const auto& work) {
    const GiveGilBack release;
    return work();
  };
  std::string head;
  const auto send = static_cast<std::string_view>(text);
  const bool has_come = without_gil(
      [&] { return connection.send(send, kToConnect, look) && connection.receive_head(head, patience, look); });
  if (has_come && request.attr("is_wanted")(py::bytes(head)).cast<bool>() &&
      without_gil([&] { return connection.receive(destination, count, patience, look); })) {
    request.attr("done")(
        py::memoryview::from_memory(static_cast<const void*>(destination), static_cast<py::ssize_t>(count)));
    return true;
  }
  request.attr("failed")();
  return false;
}

void RemoteSource::read(uint64_t offset, void* destination, size_t count) const {
  read_looking(offset, destination, count, no_look);
}

void RemoteSource::read_looking(uint64_t offset, void* destination, size_t count, const Look& look) const {
  if (count == 0) return;
  const AcquireGil acquire;
  try {
    if (read_directly(offset, destination, count, look)) return;
    Answer answer(object_.get().attr("ask")(offset, count));
    while (!answer.wait()) {
      const GiveGilBack release;
      look();
    }
    const py::object bytes = answer.bytes();
    const Buffer buffer(bytes);
    if (buffer.size() != count)
      throw Error(ErrorKind::read, "the server gave another number of bytes than it was asked for",
                  {path_, {}, offset, 0});
    const GiveGilBack release;
    std::memcpy(destination, buffer.data(), count);
  } catch (py::error_already_set& error) {
    fail_read(error, path_, offset);
  }
}

void register_connection(py::module_& module) {
  py::class_<Connection> connection(module, "Connection", "A connection by TCP that the core takes bytes from.");
  connection
      .def(py::init<const std::string&, uint16_t>(), py::arg("address"), py::arg("port"),
           "Begins to connect to a numeric address, and waits for nothing.")
      .def("is_quiet", &Connection::is_quiet, "Whether it is open, and nothing has come that nobody has asked for.");
  refuse_copies(connection);
}

}  // namespace weightload
