#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "base/unique_fd.h"

namespace weightload {

class MajorFaults;

// Puts the pages of a file that is mapped here into this process's page tables, by system calls that return an error
// where a touch would end the process with SIGBUS.
//
// All ranges begin and end at pages; what is returned is 0 or an errno: EFAULT where pages are beyond the end of the
// file or cannot be read, EINVAL from a kernel before 5.14, anything from a sandbox.
class PageTables {
 public:
  // Opens the descriptor that map_cached() asks; without /proc that works as populate().
  PageTables();

  // Every page of [begin, end); reads from the file what is not in the page cache.
  static int populate(char* begin, char* end);

  // The same, in half the time where the pages are in the page cache.
  int map_cached(char* begin, char* end) const;

  // The same where nobody knows whether they are there. `was_read`: whether some were not, or might not have been.
  int map_unknown(char* begin, char* end, bool& was_read) const;

  // Asks for three pages of the range: whether one of them had to be read, or might have been.
  static bool has_to_read(char* begin, char* end);

  // Asks for one page: whether it, and all that were asked for since `faults` began, were in the page cache. Nothing
  // where that cannot be told.
  static std::optional<bool> was_there(char* page, const MajorFaults& faults);

  // Whether an error of these is no more than a refusal, and says nothing of the bytes.
  static bool is_refusal(int error_number);

 private:
  // What one entry of the page directory maps, with pages of 4 KiB.
  static constexpr uint64_t kWindow = 2 << 20;
  using Entries = std::array<uint64_t, kWindow / 4096>;  // of pagemap, one a page

  int map_window(char* begin, char* end, bool last) const;
  bool look_up(const char* begin, size_t pages, Entries& entries) const;

  UniqueFd pagemap_;
};

}  // namespace weightload
