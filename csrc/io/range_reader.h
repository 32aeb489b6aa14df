#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

#include "base/byte_range.h"
#include "io/byte_source.h"
#include "io/direct_file.h"
#include "io/file.h"
#include "io/file_system.h"

namespace weightload {

enum class ReadMode : uint8_t {
  automatic,  // by what the page cache holds of each range, and by file system
  buffered,   // through the page cache
  direct,     // past it, on any file system that lets us
};

// How many bytes came which way; of all files of a load together.
struct ReadCounts {
  std::atomic<uint64_t> buffered_bytes{0};
  std::atomic<uint64_t> direct_bytes{0};
};

// Reads ranges of one file into buffers, each the faster way: through the page cache what is there, directly from the
// disk what is not. Many threads.
//
// Reading cold files through the page cache by several threads is slower than by one (they disturb each other's
// readahead) and throws out what others have there, so it is what is left where O_DIRECT is not to be had; the page
// cache is then filled through a mapping, see Note [Populate, then read].
class RangeReader {
 public:
  // `file` is null for bytes in memory.
  RangeReader(const ByteSource& source, const File* file, ReadMode mode, ReadCounts& counts);

  // Whether cold ranges will be read through the page cache, which is then better filled through a mapping.
  bool wants_mapping() const { return file_ && !direct_ && storage_of(*file_) != Storage::memory; }

  // The address of the file's byte 0 in a mapping that outlives the reader. Before the first read.
  void fill_cache_through(char* mapping) { mapping_ = mapping; }

  // Whether the next read of `range` should be direct().
  bool prefers_direct(ByteRange range) const;

  // As DirectFile::read. False: read it with buffered().
  bool direct(ByteRange range, char* destination);

  // Reads [begin, end) to `destination`, at any alignment. prepare() the whole of what several calls read first.
  void buffered(ByteRange range, char* destination);

  // Fills the page cache with `range`, if that helps the buffered() reads that follow.
  void prepare(ByteRange range) const;

 private:
  const ByteSource& source_;
  const File* file_;
  char* mapping_ = nullptr;
  const ReadMode mode_;
  std::unique_ptr<const DirectFile> direct_;
  std::atomic<bool> direct_works_;
  ReadCounts& counts_;
};

}  // namespace weightload
