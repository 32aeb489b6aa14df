#include "io/page_tables.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>

#include "io/fault_hook.h"

namespace weightload {
namespace {

// What one page fault maps besides its own page, if that is in the page cache (fault_around_bytes, the kernel's
// default).
constexpr uint64_t kFaultAround = 64 << 10;

// What one entry of the page directory maps, with pages of 4 KiB.
constexpr uint64_t kWindow = 2 << 20;

constexpr uint64_t kPresent = 1ull << 63;  // in an entry of pagemap

uint64_t page_bytes() {
  static const uint64_t bytes = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

uint64_t address_of(const char* memory) { return reinterpret_cast<uintptr_t>(memory); }

// From `memory` to the next multiple of `unit`, at least one byte.
uint64_t to_next(const char* memory, uint64_t unit) { return unit - address_of(memory) % unit; }

int persist(int (*call)(void*, size_t), char* begin, uint64_t size) {
  int result;
  do {
    result = call(begin, static_cast<size_t>(size));
  } while (result != 0 && errno == EINTR);
  return result == 0 ? 0 : errno;
}

}  // namespace

PageTables::PageTables() {
  int number;
  do {
    number = ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  } while (number < 0 && errno == EINTR);
  pagemap_ = UniqueFd(number);
}

int PageTables::populate(char* begin, char* end) {
  return persist(fault_hook::populate, begin, static_cast<uint64_t>(end - begin));
}

// Note [Ask for one page of sixteen]
// MADV_POPULATE_READ visits every page of its range, those too that the fault of the page before has mapped: half of
// its time, or more. A fault of one page maps its neighbours as far as they are in the page cache, and all of a huge
// page. So one page is asked for, what that has mapped is looked up, and then as few more as need be. Figures:
// csrc/README.md.
int PageTables::map_cached(char* begin, char* end) const {
  const uint64_t page = page_bytes();
  if (!pagemap_ || page >= kFaultAround) return populate(begin, end);
  auto ask = fault_hook::populate;
  while (begin < end) {
    char* const window_end = begin + std::min<uint64_t>(to_next(begin, kWindow), static_cast<uint64_t>(end - begin));
    if (const int error_number = persist(ask, begin, page)) return error_number;
    if (const int error_number = map_neighbours(begin, window_end)) return error_number;
    begin = window_end;
    ask = fault_hook::populate_on;  // all windows together are one read
  }
  return 0;
}

// The rest of a window whose first page is mapped.
int PageTables::map_neighbours(char* begin, char* end) const {
  const uint64_t page = page_bytes();
  char* mapped_end = begin + to_next(begin, kFaultAround);
  if (mapped_end >= end || !is_mapped(mapped_end - page))
    return persist(fault_hook::populate_on, begin, static_cast<uint64_t>(end - begin));
  // Not the last page: who maps what follows the range maps that too, and no more of the range.
  const char* const far = end - (address_of(end) - 1) % kFaultAround - 1 - page;
  if (far >= mapped_end && is_mapped(far)) return 0;
  while (mapped_end < end) {
    // The last page of each sixteen: at the start of a mapping the kernel's sixteen are out of step with these, and the
    // first page may be mapped while the last is not.
    mapped_end += std::min<uint64_t>(kFaultAround, static_cast<uint64_t>(end - mapped_end));
    if (const int error_number = persist(fault_hook::populate_on, mapped_end - page, page)) return error_number;
  }
  return 0;
}

bool PageTables::is_mapped(const char* page) const {
  uint64_t entry = 0;
  const auto position = static_cast<off_t>(address_of(page) / page_bytes() * sizeof(entry));
  const ssize_t got = ::pread(pagemap_.get(), &entry, sizeof(entry), position);
  return got == sizeof(entry) && (entry & kPresent) != 0;
}

}  // namespace weightload
