#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "file/byte_tap.h"

namespace weightload {

// A tap of Python's, an object that has
//   take(offset, bytes)   a memoryview that is valid until this returns; by any thread
//   leave()               by the thread that makes the load
class PythonTap final : public ByteTap {
 public:
  // `path`: of the file, for messages.
  PythonTap(pybind11::object object, std::string path);
  ~PythonTap() override;

  void take(uint64_t offset, const char* bytes, size_t count) const override;
  void leave() const override;

 private:
  pybind11::object object_;
  const std::string path_;
};

}  // namespace weightload
