#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>

#include "base/byte_range.h"
#include "base/look.h"
#include "file/byte_source.h"
#include "file/byte_tap.h"
#include "file/file.h"
#include "file/file_counts.h"
#include "file/file_system.h"
#include "page_cache/cache_filler.h"
#include "page_cache/load_mappings.h"
#include "page_cache/mapped_copy.h"
#include "read/direct_file.h"
#include "read/read_rates.h"
#include "threads/pace.h"

namespace weightload {

enum class ReadMode : uint8_t {
  automatic,  // by what the page cache holds of each range, by file system, and by what was faster
  buffered,   // through the page cache
  direct,     // past it, on any file system that lets us
  uncached,   // as automatic, but what is not in the page cache always past it: see ReadRates
};

// Reads ranges of one file into buffers, each the faster way: through the page cache what is there, and what is not
// either past it or through it, as ReadRates have it. Many threads.
//
// Reading a cold file through the page cache by several threads at once is slow (they disturb each other's readahead),
// so the cache is filled through a mapping first, see CacheFiller. Not on file systems in user space: there a mapping
// may have to read anew what was read already, and on slow storage nothing would end the filling. What is in the cache
// is copied by read calls, or faster, see Note [Copies past the caches].
class RangeReader {
 public:
  // How one range is being read.
  struct Attempt {
    ByteRange range;
    const Look& look;                   // between pieces
    bool timed = false;                 // to be recorded: ReadRates were asked
    bool direct = false;                // to be read with direct()
    bool cached = false;                // should be in the page cache
    std::optional<Pages> into_cache{};  // what the page cache gets, to be recorded
    std::optional<MappedCopy> copy{};   // of what is in the page cache, where the file allows it
    ByteRange untold{};                 // has been read, and the tap is not told of it yet
    const char* untold_bytes = nullptr;
    std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
  };

  // `file` is null for what is no file. `tap`: is told of all that is read, if it is not null. `memory`: where what is
  // read directly will go. `pace`, `filler` and `mappings` are the load's.
  RangeReader(const ByteSource& source, const File* file, const ByteTap* tap, ReadMode mode, ReadInto memory,
              FileCounts& counts, Pace& pace, CacheFiller& filler, LoadMappings& mappings);

  // Decides, and prepares the page cache where the range will be read through it. `may_be_direct` is false where the
  // memory it will go to does not allow that. `look` outlives the attempt.
  Attempt begin(ByteRange range, const Look& look, bool may_be_direct = true);

  // The same for pieces of a range that are far apart: nothing in between is read.
  Attempt begin_scattered(ByteRange range, const Look& look) const;

  // As DirectFile::read, of a part of the range. False: the attempt is no longer direct, read the range with
  // buffered().
  bool direct(Attempt& attempt, ByteRange part, char* destination);

  // The same of all of it, as DirectFile::read_within.
  bool direct_within(Attempt& attempt, char* destination);

  // Reads a part of the range, or all of it, to `destination`, at any alignment, where the bytes stay as they are until
  // end(). `past_caches`: it is memory that has its pages, and nobody needs the bytes at once.
  void buffered(Attempt& attempt, ByteRange part, char* destination, bool past_caches = false);

  // Copies pieces of the range that should be in the page cache, as MappedCopy::read_pieces, to memory that has its
  // pages. False: they are to be read.
  bool copy_pieces(Attempt& attempt, ByteRange first, uint64_t stride, uint64_t count, char* destination);

  bool asks_server() const { return source_.is_remote(); }
  bool is_tapped() const { return tap_ != nullptr; }

  // All bytes are there.
  void end(Attempt& attempt);

 private:
  bool can_be_direct();
  bool was_direct(Attempt& attempt, ByteRange part, const char* destination, std::optional<uint64_t> got);
  bool is_in_memory() const;
  bool may_fill() const;
  bool may_copy(Attempt& attempt);
  void tell(Attempt& attempt, ByteRange range, const char* bytes) const;
  void tell_later(Attempt& attempt, ByteRange range, const char* bytes) const;
  void tell_rest(Attempt& attempt) const;
  void record(const Attempt& attempt);

  const ByteSource& source_;
  const File* file_;
  const ByteTap* tap_;
  const ReadMode mode_;
  const ReadInto memory_;
  FileCounts& counts_;
  Pace& pace_;
  CacheFiller& filler_;
  LoadMappings& mappings_;
  Storage storage_ = Storage::memory;
  std::mutex
      opening_;  // guards the two below: by the first range, as a load may have more files than it can open twice
  bool opened_ = false;
  std::unique_ptr<const DirectFile> direct_;
  std::atomic<bool> direct_works_{false};
  ReadRates* rates_ = nullptr;
};

}  // namespace weightload
