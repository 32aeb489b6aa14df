#pragma once
#include <cstdint>

namespace weightload {

// Half-open range of bytes [begin, end) in a file. An empty range has begin == end.
struct ByteRange {
  uint64_t begin = 0;
  uint64_t end = 0;

  uint64_t size() const { return end - begin; }
  bool empty() const { return begin == end; }
  bool operator==(const ByteRange& other) const { return begin == other.begin && end == other.end; }
};

// Rounds `value` up to a multiple of `unit`, which must be a power of two. The caller keeps the sum below
// 2^64; every value here is bounded by a file's size, which the kernel keeps below 2^63.
inline uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) & ~(unit - 1); }
inline uint64_t round_down(uint64_t value, uint64_t unit) { return value & ~(unit - 1); }

// Memory and file positions of reads that bypass the page cache (O_DIRECT) agree modulo this: the largest logical block
// of common disks.
constexpr uint64_t kDirectAlignment = 4096;

}  // namespace weightload
