#pragma once
#include <cstddef>
#include <cstdint>

namespace weightload {

// Is told of what a load reads of a file, by the threads that read it, at once: while the processor's caches have it.
class ByteTap {
 public:
  virtual ~ByteTap() = default;

  // How many bytes it is best told of at a time, now. Not much more than the processor's caches have, but where it has
  // to wait each time.
  virtual size_t piece() const = 0;

  // Bytes of the file from `offset` on have been read to `bytes`. By many threads; what it throws ends the load.
  virtual void take(uint64_t offset, const char* bytes, size_t count) const = 0;

  // The load does not read its tensors of this file byte by byte: they are views, or parts, or other ranks read some.
  // By the thread that makes the load, before any take(): there will be none.
  virtual void leave() const = 0;
};

}  // namespace weightload
