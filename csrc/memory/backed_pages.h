#pragma once
#include <cstddef>

#include "base/unique_fd.h"

namespace weightload {

// Whether memory has all its pages, and they are nobody else's: private, and of no file. A store to it then only waits
// where the system has put a page away meanwhile. Other memory may be a hole of a full disk, or of a file that is cut
// off meanwhile: a store there ends the process, where a read call returns an error.
class BackedPages {
 public:
  // Opens /proc/self/pagemap; without it no memory is known to be so.
  BackedPages();

  // A system call for each 2 MiB.
  bool has_all(const char* begin, size_t size) const;

 private:
  UniqueFd pagemap_;
};

}  // namespace weightload
