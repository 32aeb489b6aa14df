#pragma once
#include <algorithm>
#include <cstdint>

#include "base/byte_range.h"
#include "file/file.h"
#include "page_cache/residency.h"

namespace weightload {

// Calls cached(run) and stored(run), in order, for the parts of the range that are in the page cache and those that are
// not, or of which the kernel does not say. How long storage takes is learned of the latter alone.
template <typename Cached, typename Stored>
void by_residency(const File& file, ByteRange range, Cached&& cached, Stored&& stored) {
  constexpr uint64_t kStep = 64 << 10;
  const auto is_cached = [&](uint64_t from) {
    const ByteRange step{from, std::min(from + kStep, range.end)};
    return cached_bytes(file, step) == step.size();
  };
  for (ByteRange run{range.begin, range.begin}; run.begin < range.end; run.begin = run.end) {
    const bool here = is_cached(run.begin);
    do {
      run.end = std::min(run.end + kStep, range.end);
    } while (run.end < range.end && is_cached(run.end) == here);
    if (here) {
      cached(run);
    } else {
      stored(run);
    }
  }
}

}  // namespace weightload
