#pragma once
#include <cstdint>
#include <mutex>

#include "io/file.h"

namespace weightload {

// Which way of reading what is not in the page cache has been the faster one so far, past it or through it. Not a thing
// that can be known: O_DIRECT saves a copy, but on some virtual disks it is half as fast as the kernel's own readahead.
// So both are tried, a few ranges each, and then the better one is taken; the other gets another chance now and then.
class ReadRates {
 public:
  // Of the file system that holds the file; for the life of the process.
  static ReadRates& of(const File& file);

  bool choose_direct();
  void record(bool direct, uint64_t bytes, uint64_t nanoseconds);

 private:
  struct Way {
    uint64_t chosen = 0;
    uint64_t recorded = 0;
    double ns_per_byte = 0;  // of one thread; a moving average
  };

  std::mutex mutex_;
  Way direct_, buffered_;
};

}  // namespace weightload
