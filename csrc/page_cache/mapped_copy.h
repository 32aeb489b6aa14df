#pragma once
#include <optional>

#include "base/byte_range.h"
#include "file/file.h"
#include "page_cache/load_mappings.h"

namespace weightload {

// Note [Copies past the caches]
// Copies a range of a file that is in the page cache, in two thirds of the time that read calls take for it: the kernel
// writes as everybody does, and a store to memory that is in no cache reads it first. Only what is mapped can be copied
// by stores past the caches. Into memory that has its pages: of those that the kernel has just filled with zeros the
// zeros are in a cache, which makes read calls the faster way. csrc/notes/page_cache.md has figures.
//
// One thread; nothing is mapped until it is needed.
class MappedCopy {
 public:
  // Smaller ranges are not worth a mapping.
  static constexpr uint64_t kLeastBytes = 1 << 20;

  MappedCopy(const File& file, ByteRange range, LoadMappings& mappings)
      : file_(file), range_(range), mappings_(mappings) {}

  // Copies a part of the range. False where that cannot be done, or went wrong: it is to be read, which says why.
  bool read(ByteRange part, char* destination) { return read_pieces(part, 0, 1, destination); }

  // The same of pieces of the range, to one behind the other: `count` of the size of the first one, `stride` bytes from
  // one's beginning to the next one's.
  bool read_pieces(ByteRange first, uint64_t stride, uint64_t count, char* destination);

 private:
  const File& file_;
  const ByteRange range_;
  LoadMappings& mappings_;
  bool failed_ = false;
  bool random_ = false;  // the mapping's pages are asked for one by one
  std::optional<LoadMappings::Mapping> mapping_;
};

}  // namespace weightload
