#pragma once
#include "base/unique_fd.h"

namespace weightload {

// Puts the pages of a file that is mapped here into this process's page tables, by system calls that return an error
// where a touch would end the process with SIGBUS.
//
// All ranges begin and end at pages; what is returned is 0 or an errno: EFAULT where pages are beyond the end of the
// file or cannot be read, EINVAL from a kernel before 5.14.
class PageTables {
 public:
  // Opens the descriptor that map_cached() asks; without /proc that works as populate().
  PageTables();

  // Every page of [begin, end); reads from the file what is not in the page cache.
  static int populate(char* begin, char* end);

  // The same for pages that are in the page cache, in half the time. What the kernel passes over (a page that is just
  // being written, or marks the end of a readahead) is left to its page fault.
  int map_cached(char* begin, char* end) const;

 private:
  int map_neighbours(char* begin, char* end) const;
  bool is_mapped(const char* page) const;

  UniqueFd pagemap_;
};

}  // namespace weightload
