#pragma once
#include <chrono>
#include <cstdint>
#include <optional>

#include "base/byte_range.h"
#include "file/file.h"

namespace weightload {

// Whether bytes of a file are known to be in the page cache, for who asks of one small range after the other. Asked of
// mincore: to cachestat a page that could not be read is as good as any other, and touching it is a SIGBUS. Where the
// kernel does not say, as of other users' files: whether they seem to be there, and can be mapped.
//
// A call each would show at twenty thousand tensors. So who asks in quick succession is answered for more and more of
// the file at once, and by that answer for thirty times as long as it took, at most 10 ms. One thread at a time.
class KnownCached {
 public:
  // Whether it is so by an earlier answer.
  bool remembers(ByteRange range) const;

  // `mapping`: the address of the file's byte 0 in one. Nothing where it would have to be asked in a way that may wait
  // for storage, and `may_wait` is false.
  std::optional<bool> contains(const File& file, char* mapping, ByteRange range, bool may_wait);

 private:
  using Clock = std::chrono::steady_clock;

  std::optional<bool> ask(const File& file, char* mapping, ByteRange range, bool may_wait);
  std::optional<bool> ask_and_remember(const File& file, char* mapping, ByteRange range, bool may_wait);

  ByteRange known_;  // in the page cache, until
  Clock::time_point known_until_;
  Clock::time_point mixed_until_;  // not all around is there: no use in asking
  Clock::time_point asked_;        // last
  bool untold_ = false;            // the kernel does not say
  uint64_t width_ = 0;             // of what is asked for at once, a power of two; 0: the range alone
};

}  // namespace weightload
