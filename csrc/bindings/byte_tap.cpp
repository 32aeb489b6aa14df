#include "bindings/byte_tap.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "bindings/failed_read.h"
#include "bindings/gil.h"

namespace py = pybind11;

namespace weightload {

namespace {

constexpr size_t kLeastPiece = 1 << 20;  // a CRC of it takes 0.05 ms at the most
constexpr size_t kMostPiece = 16 << 20;

// A thread that runs Python code gives the GIL away after 5 ms, and a call wants it twice.
constexpr std::chrono::microseconds kLong{2500}, kShort{1000};

}  // namespace

PythonTap::PythonTap(py::object object, std::string path)
    : object_(std::move(object)), path_(std::move(path)), piece_(kLeastPiece) {}

void PythonTap::take(uint64_t offset, const char* bytes, size_t count) const {
  const auto begin = std::chrono::steady_clock::now();
  const AcquireGil acquire;
  try {
    object_.get().attr("take")(
        offset, py::memoryview::from_memory(static_cast<const void*>(bytes), static_cast<py::ssize_t>(count)));
  } catch (py::error_already_set& error) {
    fail_read(error, path_, offset);
  }
  const auto took = std::chrono::steady_clock::now() - begin;
  if (took > kLong) piece_ = std::min(2 * count, kMostPiece);
  if (took < kShort) piece_ = std::max(count / 2, kLeastPiece);
}

void PythonTap::leave() const {
  const AcquireGil acquire;
  object_.get().attr("leave")();
}

}  // namespace weightload
