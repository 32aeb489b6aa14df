#pragma once
#include <pybind11/pybind11.h>

#include <atomic>
#include <string>

#include "bindings/gil.h"
#include "file/byte_tap.h"

namespace weightload {

// A tap of Python's, an object that has
//   take(offset, bytes)   a memoryview that is valid until this returns; by any thread
//   leave()               by the thread that makes the load
class PythonTap final : public ByteTap {
 public:
  // `path`: of the file, for messages.
  PythonTap(pybind11::object object, std::string path);

  size_t piece() const override { return piece_.load(std::memory_order_relaxed); }
  void take(uint64_t offset, const char* bytes, size_t count) const override;
  void leave() const override;

 private:
  const ObjectOfAnyThread object_;
  const std::string path_;
  mutable std::atomic<size_t> piece_;
};

}  // namespace weightload
