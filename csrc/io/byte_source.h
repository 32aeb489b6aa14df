#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace weightload {

// Something with a fixed number of bytes that many threads may read at once: a file, or memory.
class ByteSource {
 public:
  virtual ~ByteSource() = default;

  // Fills [destination, destination + count) from `offset`, or throws; never returns with fewer bytes.
  virtual void read(uint64_t offset, void* destination, size_t count) const = 0;

  // Throws when the bytes are no longer those that were there when it was opened. After reading and before the bytes go
  // to anyone: what was read until then is then one state, that of the opening. `offset` serves the message.
  virtual void require_unchanged(uint64_t offset) const = 0;

  // The bytes that it starts with, before others read it: something to compare later, where nothing else tells a
  // change.
  virtual void remember_start(std::string_view) const {}

  virtual const std::string& path() const = 0;  // for messages
  virtual uint64_t size() const = 0;            // bytes, as it was when opened
};

}  // namespace weightload
