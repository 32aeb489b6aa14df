#pragma once
#include <cstdint>
#include <mutex>

#include "file/file.h"

namespace weightload {

// Whose pages a direct read fills. The disk is handed them one by one, or many as one where they lie together.
enum class ReadInto : uint8_t { pinned, pageable };

// Which way of reading what is not in the page cache has been the faster one so far, past it or through it. Not a thing
// that can be known: O_DIRECT saves a copy, but on some virtual disks it is half as fast as the kernel's own readahead.
// So both are tried, a few ranges each, and then the better one is taken; the other gets another chance now and then.
//
// Not for processes that read other parts of the same files at the same time. Each of them has few ranges to try on,
// and a trial tells what the others are doing. They have many reads in hand together, which is when a disk is as fast
// directly, while in the page cache they would disturb one another's readahead.
class ReadRates {
 public:
  // Of the file system that holds the file, and of such memory; for the life of the process.
  static ReadRates& of(const File& file, ReadInto memory);

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
