#pragma once
#include <cstring>
#include <string>

#include "base/error.h"
#include "file/byte_source.h"

namespace weightload {

// Bytes somebody else owns and keeps alive and unchanged for as long as this is read.
class MemorySource final : public ByteSource {
 public:
  MemorySource(const void* data, uint64_t size) : data_(static_cast<const char*>(data)), size_(size) {}

  void read(uint64_t offset, void* destination, size_t count) const override {
    if (offset > size_ || count > size_ - offset)
      throw Error(ErrorKind::read, "the bytes end early", {path_, {}, offset, 0});
    if (count > 0) std::memcpy(destination, data_ + offset, count);
  }
  void read_on(bool) const override {}
  void require_unchanged(uint64_t) const override {}
  const std::string& path() const override { return path_; }
  uint64_t size() const override { return size_; }

 private:
  const char* data_;
  uint64_t size_;
  std::string path_ = "<bytes>";
};

}  // namespace weightload
