#pragma once
#include "base/byte_range.h"
#include "file/file.h"
#include "memory/page_prices.h"
#include "page_cache/load_mappings.h"

namespace weightload {

// Fills the page cache for reads that follow, through mappings: the fastest way we found (Note [Populate, then read] in
// page_in.cpp). Many threads.
class CacheFiller {
 public:
  explicit CacheFiller(LoadMappings& mappings) : mappings_(mappings) {}

  // Best effort: what cannot be read is left to the read to find. False where nothing was done, as on a file system
  // that cannot map, or in a process that may not map more. `known`: some of the range is not in the page cache;
  // otherwise nobody knows, and nothing more is asked for where some of its pages turn out to be there.
  bool fill(const File& file, ByteRange range, bool known);

  // Of pages of the page cache: a mapping brings in huge ones, a read single ones.
  PagePrices& prices() { return prices_; }

 private:
  // What the kernel's readahead brings in by itself is the rule: huge pages of the page cache are to be worth it.
  PagePrices prices_{0.85};
  LoadMappings& mappings_;
};

}  // namespace weightload
