#include "page_cache/page_tables.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <optional>

#include "base/pages.h"
#include "base/uninterrupted.h"
#include "file/fault_hook.h"
#include "memory/pagemap.h"
#include "page_cache/major_faults.h"

namespace weightload {
namespace {

// What one page fault maps besides its own page, if that is in the page cache (fault_around_bytes, the kernel's
// default).
constexpr uint64_t kFaultAround = 64 << 10;

uint64_t address_of(const char* memory) { return reinterpret_cast<uintptr_t>(memory); }

// From `memory` to the next multiple of `unit`, at least one byte.
uint64_t to_next(const char* memory, uint64_t unit) { return unit - address_of(memory) % unit; }

bool is_mapped(uint64_t entry) { return (entry & kPagePresent) != 0; }

// The first of the entries from `first` on that is mapped, or is not; `count` if there is none.
template <typename Entries>
size_t find(const Entries& entries, size_t first, size_t count, bool mapped) {
  while (first < count && is_mapped(entries[first]) != mapped) ++first;
  return first;
}

int retry_interrupted(int (*call)(void*, size_t), char* begin, uint64_t size) {
  return uninterrupted([&] { return call(begin, static_cast<size_t>(size)); }) == 0 ? 0 : errno;
}

}  // namespace

PageTables::PageTables() { pagemap_ = open_pagemap(); }

int PageTables::populate(char* begin, char* end) {
  return retry_interrupted(fault_hook::populate, begin, static_cast<uint64_t>(end - begin));
}

// Note [Ask for one page of sixteen]
// MADV_POPULATE_READ visits every page of its range, those too that the fault of the page before has mapped: half of
// its time, or more. A fault of one page maps its neighbours as far as they are in the page cache, and all of a huge
// page. So one page is asked for, what that has mapped is looked up, then one page of each sixteen that are not mapped,
// and at last what was passed over, for whatever reason. csrc/notes/page_cache.md has figures.
int PageTables::map_cached(char* begin, char* end) const {
  const uint64_t page = page_bytes();
  if (!pagemap_ || page >= kFaultAround) return populate(begin, end);
  auto ask = fault_hook::populate;
  while (begin < end) {
    char* const window_end = begin + std::min<uint64_t>(to_next(begin, kWindow), static_cast<uint64_t>(end - begin));
    if (const int error_number = retry_interrupted(ask, begin, page)) return error_number;
    if (const int error_number = map_window(begin, window_end, window_end == end)) return error_number;
    begin = window_end;
    ask = fault_hook::populate_on;  // all windows together are one read
  }
  return 0;
}

int PageTables::map_unknown(char* begin, char* end, bool& was_read) const {
  const uint64_t page = page_bytes();
  const MajorFaults faults;
  auto ask = fault_hook::populate;
  while (begin < end) {
    char* const window_end = begin + std::min<uint64_t>(to_next(begin, kWindow), static_cast<uint64_t>(end - begin));
    if (const int error_number = retry_interrupted(ask, begin, page)) return error_number;
    ask = fault_hook::populate_on;  // all windows together are one read
    was_read = faults.any();
    if (was_read) return retry_interrupted(ask, begin, static_cast<uint64_t>(end - begin));
    if (const int error_number = map_window(begin, window_end, window_end == end)) return error_number;
    begin = window_end;
  }
  was_read = faults.any();
  return 0;
}

bool PageTables::has_to_read(char* begin, char* end) {
  const uint64_t page = page_bytes();
  const MajorFaults faults;
  for (char* const at : {begin, begin + round_down(static_cast<uint64_t>(end - begin) / 2, page), end - page}) {
    if (retry_interrupted(fault_hook::populate_on, at, page) != 0 || faults.any()) return true;
  }
  return false;
}

std::optional<bool> PageTables::was_there(char* page, const MajorFaults& faults) {
  const int error_number = retry_interrupted(fault_hook::populate_on, page, page_bytes());
  if (is_refusal(error_number) || !faults.are_counted()) return std::nullopt;
  return error_number == 0 && !faults.any();
}

// A sandbox answers whatever it was told to: what counts is what is none. EIO is for the fault hook, the kernel says
// EFAULT; ENOMEM is a real lack of memory, where going on would end in the process being killed.
bool PageTables::is_refusal(int error_number) {
  switch (error_number) {
    case 0:
    case EFAULT:
    case EIO:
    case EHWPOISON:
    case ENOMEM: return false;
    default: return true;
  }
}

// The rest of a window whose first page is mapped.
int PageTables::map_window(char* begin, char* end, bool last) const {
  const uint64_t page = page_bytes();
  const auto pages = static_cast<size_t>(end - begin) / page;
  Entries entries;
  // A whole window that its first page's fault has mapped to the end: a huge page. In the range's last window somebody
  // else may have mapped the end, whose own range begins in the last page.
  if (!last && pages == entries.size() && look_up(end - page, 1, entries) && is_mapped(entries[0])) return 0;
  if (!look_up(begin, pages, entries)) return retry_interrupted(fault_hook::populate_on, begin, pages * page);
  if (find(entries, 0, pages, false) == pages) return 0;

  for (size_t next = 0; next < pages;) {
    next = std::min(pages, next + to_next(begin + next * page, kFaultAround) / page);
    // The last of each sixteen: at the start of a mapping the kernel's sixteen are out of step with these, and the
    // first page may be mapped while the last is not.
    if (is_mapped(entries[next - 1])) continue;
    if (const int error_number = retry_interrupted(fault_hook::populate_on, begin + (next - 1) * page, page))
      return error_number;
  }

  if (!look_up(begin, pages, entries)) return retry_interrupted(fault_hook::populate_on, begin, pages * page);
  for (size_t first = find(entries, 0, pages, false); first < pages; first = find(entries, first, pages, false)) {
    const size_t last = find(entries, first, pages, true);
    if (const int error_number =
            retry_interrupted(fault_hook::populate_on, begin + first * page, (last - first) * page))
      return error_number;
    first = last;
  }
  return 0;
}

bool PageTables::look_up(const char* begin, size_t pages, Entries& entries) const {
  if (!pagemap_ || page_bytes() >= kFaultAround) return false;
  const size_t bytes = pages * sizeof(entries[0]);
  const auto position = static_cast<off_t>(address_of(begin) / page_bytes() * sizeof(entries[0]));
  return ::pread(pagemap_.get(), entries.data(), bytes, position) == static_cast<ssize_t>(bytes);
}

}  // namespace weightload
