#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace weightload {

// Something with a fixed number of bytes that many threads may read at once: a file, or memory.
class ByteSource {
 public:
  virtual ~ByteSource() = default;

  // Fills [destination, destination + count) from `offset`, or throws; never returns with fewer bytes.
  virtual void read(uint64_t offset, void* destination, size_t count) const = 0;

  virtual const std::string& path() const = 0;  // for messages
  virtual uint64_t size() const = 0;            // bytes, as it was when opened
};

}  // namespace weightload
