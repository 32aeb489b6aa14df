#pragma once
#include <atomic>
#include <cstdint>

namespace weightload {

// How many of a file's bytes a load has read, which way, and how long that took its threads.
struct FileCounts {
  std::atomic<uint64_t> mapped_bytes{0};    // brought into a mapping
  std::atomic<uint64_t> buffered_bytes{0};  // read through the page cache
  std::atomic<uint64_t> direct_bytes{0};    // read past it
  std::atomic<uint64_t> rounded_bytes{0};   // of that, more: the rest of disk blocks, which are read whole
  std::atomic<uint64_t> wanted_bytes{0};    // of tensors, for which all this was read
  std::atomic<uint64_t> read_ns{0};         // of all threads together
};

}  // namespace weightload
