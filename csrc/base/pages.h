#pragma once
#include <unistd.h>

#include <cstddef>
#include <cstdint>

#include "base/byte_range.h"

namespace weightload {

// Of x86-64, and of arm64 with 4 KiB pages; elsewhere just an alignment.
inline constexpr size_t kHugePage = 2u << 20;

// The kernel's page size in bytes, a power of two: 4 KiB, or up to 64 KiB on some machines.
inline uint64_t page_bytes() {
  static const uint64_t bytes = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

// All pages that hold bytes of the range.
inline ByteRange pages_around(ByteRange range) {
  return {round_down(range.begin, page_bytes()), round_up(range.end, page_bytes())};
}

// The pages that hold bytes of the range only; may be none.
inline ByteRange pages_within(ByteRange range) {
  const uint64_t begin = round_up(range.begin, page_bytes());
  const uint64_t end = round_down(range.end, page_bytes());
  return begin < end ? ByteRange{begin, end} : ByteRange{};
}

}  // namespace weightload
