#pragma once
#include <shared_mutex>

#include "base/byte_range.h"
#include "base/page_prices.h"
#include "io/file.h"

namespace weightload {

// Fills the page cache for reads that follow, through mappings of its own: the fastest way we found (Note [Populate,
// then read] in page_in.cpp). Many threads.
//
// A mapping is of the range alone, cannot be written to, and is gone when fill() returns. So filling takes address
// space for a task a thread, locked pages are the page cache's own (mlockall), and nobody else has pages of it in hand.
class CacheFiller {
 public:
  // Best effort: what cannot be read is left to the read to find. False where nothing was done, as on a file system
  // that cannot map, or in a process that may not map more. `known`: some of the range is not in the page cache;
  // otherwise nobody knows, and nothing more is asked for where some of its pages turn out to be there.
  bool fill(const File& file, ByteRange range, bool known);

  // Of pages of the page cache: a mapping brings in huge ones, a read single ones.
  PagePrices& prices() { return prices_; }

  // From now on nothing is mapped, and nothing is when it returns: the address space is needed for tensors.
  void give_up();

 private:
  // What the kernel's readahead brings in by itself is the rule: huge pages of the page cache are to be worth it.
  PagePrices prices_{0.85};
  std::shared_mutex filling_;
  bool given_up_ = false;  // guarded by filling_
};

}  // namespace weightload
