#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "base/byte_range.h"
#include "base/unique_fd.h"

namespace weightload {

// Whether memory has all its pages, or none, and they are nobody else's: private, and not of a file's mapping. A store
// to it then only waits where the system has put a page away meanwhile. Other memory may be a hole of a full disk, or
// of a file that is cut off meanwhile, which takes private copies of its pages, too: a store there ends the process,
// where a read call returns an error.
//
// Of memory that is there when it is first asked, and of anonymous memory that comes later. Many threads.
class BackedPages {
 public:
  // A system call for each 2 MiB; the first time a look at all the mappings of the process, about a millisecond.
  // Without /proc no memory is known to be so.
  bool has_all(const char* begin, size_t size);

  // Whether it has no page yet, and is private memory all the same: the first to touch it waits for the system to find
  // some. One system call for each 2 MiB.
  bool has_none(const char* begin, size_t size);

  // No thread asks any more: gives back what that took.
  void close() noexcept;

 private:
  void look();
  template <class Predicate>
  bool holds_for_all(const char* begin, size_t size, Predicate predicate);
  bool is_of_file(ByteRange memory) const;

  std::mutex mutex_;  // guards the three below until they are there
  bool looked_ = false;
  UniqueFd pagemap_;
  std::vector<ByteRange> files_mappings_;  // by address
};

}  // namespace weightload
