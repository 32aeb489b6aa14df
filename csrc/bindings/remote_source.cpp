#include "bindings/remote_source.h"

#include <chrono>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "bindings/gil.h"
#include "bindings/signals.h"
#include "file/socket_bytes.h"

namespace py = pybind11;

namespace weightload {
namespace {

// How long a thread waits for an answer before it looks whether its load has been stopped.
constexpr double kSecondsBetweenLooks = std::chrono::duration<double>(kSignalInterval).count();

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

// A request whose body is taken from its connection. One that is not done is dropped, and its connection with it.
class DirectRequest {
 public:
  explicit DirectRequest(py::object request) : request_(std::move(request)) {}
  ~DirectRequest() {
    if (!request_) return;
    try {
      request_.attr("drop")();
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("dropping a connection");
    }
  }
  DirectRequest(const DirectRequest&) = delete;
  DirectRequest& operator=(const DirectRequest&) = delete;

  int socket() const { return request_.attr("fileno")().cast<int>(); }
  std::chrono::milliseconds patience() const {
    return std::chrono::milliseconds(static_cast<int64_t>(1000 * request_.attr("patience").cast<double>()));
  }
  py::object head() const { return request_.attr("head")(); }
  void done(const void* body, size_t count) {
    const py::object request = std::exchange(request_, py::object());
    request.attr("done")(py::memoryview::from_memory(body, static_cast<py::ssize_t>(count)));
  }

 private:
  py::object request_;
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

int errno_of(const py::object& exception) {
  const py::object number = py::getattr(exception, "errno", py::none());
  return py::isinstance<py::int_>(number) ? number.cast<int>() : 0;
}

}  // namespace

RemoteSource::RemoteSource(py::object object, std::string path, uint64_t size)
    : object_(std::move(object)), path_(std::move(path)), size_(size) {}

// By whatever thread lets go of it last. After the interpreter's exit hook nothing of Python's is freed any more.
RemoteSource::~RemoteSource() {
  if (interpreter_is_ending()) {
    static_cast<void>(object_.release());
    return;
  }
  const py::gil_scoped_acquire acquire;
  object_ = {};
}

// What a signal handler raised, and Ctrl-C, are not of the object.
void RemoteSource::fail(py::error_already_set& error, uint64_t offset) const {
  if (!error.matches(PyExc_Exception)) throw std::move(error);
  const py::object exception = error.value();
  if (error.trace()) PyException_SetTraceback(exception.ptr(), error.trace().ptr());
  py::module_::import("weightload._base.handlers").attr("pass_on")(exception);
  PyException_SetTraceback(exception.ptr(), Py_None);
  throw Error(ErrorKind::read, py::str(exception), {path_, {}, offset, errno_of(exception)});
}

bool RemoteSource::read_directly(uint64_t offset, void* destination, size_t count, const Look& look) const {
  py::object begun = object_.attr("begin_direct")(offset, count);
  if (begun.is_none()) return false;
  DirectRequest request(std::move(begun));
  const int socket = request.socket();
  const Patience patience{request.patience(), kSignalInterval};
  {
    const py::gil_scoped_release release;
    if (!wait_for_bytes(socket, patience, look)) return false;
  }
  const py::object head = request.head();
  if (head.is_none()) return false;
  const Buffer first(head);
  if (first.size() > count) return false;
  {
    const py::gil_scoped_release release;
    std::memcpy(destination, first.data(), first.size());
    if (!receive(socket, static_cast<char*>(destination) + first.size(), count - first.size(), patience, look))
      return false;
  }
  request.done(destination, count);
  return true;
}

void RemoteSource::read(uint64_t offset, void* destination, size_t count) const {
  read_looking(offset, destination, count, no_look);
}

void RemoteSource::read_looking(uint64_t offset, void* destination, size_t count, const Look& look) const {
  if (count == 0) return;
  const py::gil_scoped_acquire acquire;
  try {
    if (read_directly(offset, destination, count, look)) return;
    Answer answer(object_.attr("ask")(offset, count));
    while (!answer.wait()) {
      const py::gil_scoped_release release;
      look();
    }
    const py::object bytes = answer.bytes();
    const Buffer buffer(bytes);
    if (buffer.size() != count)
      throw Error(ErrorKind::read, "the server gave another number of bytes than it was asked for",
                  {path_, {}, offset, 0});
    const py::gil_scoped_release release;
    std::memcpy(destination, buffer.data(), count);
  } catch (py::error_already_set& error) {
    fail(error, offset);
  }
}

}  // namespace weightload
