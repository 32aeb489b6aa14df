#include "memory/backed_pages.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "base/pages.h"
#include "memory/pagemap.h"

namespace weightload {
namespace {

bool is_private(uint64_t entry) { return (entry & (kPagePresent | kPageOfFile)) == kPagePresent; }

bool is_none(uint64_t entry) { return (entry & (kPagePresent | kPageSwapped)) == 0; }

// Where files are mapped in this process; everywhere, if that cannot be told.
std::vector<ByteRange> mappings_of_files() {
  const std::vector<ByteRange> everywhere{{0, std::numeric_limits<uint64_t>::max()}};
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> maps(std::fopen("/proc/self/maps", "re"), &std::fclose);
  if (!maps) return everywhere;
  std::vector<ByteRange> found;
  struct Line {
    char* text = nullptr;
    size_t room = 0;
    ~Line() { std::free(text); }
  } line;
  bool understood = false;
  while (::getline(&line.text, &line.room, maps.get()) > 0) {
    ByteRange range;
    uint64_t inode = 0;
    understood =
        std::sscanf(line.text, "%" SCNx64 "-%" SCNx64 " %*s %*s %*s %" SCNu64, &range.begin, &range.end, &inode) == 3;
    if (!understood) break;
    if (inode != 0) found.push_back(range);
  }
  return understood ? found : everywhere;
}

}  // namespace

void BackedPages::look() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (looked_) return;
  looked_ = true;
  try {
    files_mappings_ = mappings_of_files();
    pagemap_ = open_pagemap();
  } catch (const std::bad_alloc&) {  // the load does without, in what memory there is
  }
}

void BackedPages::close() noexcept {
  pagemap_.reset();
  files_mappings_ = {};
}

bool BackedPages::is_of_file(ByteRange memory) const {
  const auto ends_before = [](ByteRange mapping, uint64_t address) { return mapping.end <= address; };
  const auto next = std::lower_bound(files_mappings_.begin(), files_mappings_.end(), memory.begin, ends_before);
  return next != files_mappings_.end() && next->begin < memory.end;
}

template <class Predicate>
bool BackedPages::holds_for_all(const char* begin, size_t size, Predicate predicate) {
  look();
  if (!pagemap_ || size == 0) return false;
  const auto first = reinterpret_cast<uintptr_t>(begin);
  const ByteRange pages = pages_around({first, first + size});
  if (is_of_file(pages)) return false;
  std::array<uint64_t, kHugePage / 4096> entries;
  for (uint64_t page = pages.begin / page_bytes(), end = pages.end / page_bytes(); page < end;) {
    const auto count = static_cast<size_t>(std::min<uint64_t>(entries.size(), end - page));
    const size_t bytes = count * sizeof(entries[0]);
    const auto at = static_cast<off_t>(page * sizeof(entries[0]));
    if (::pread(pagemap_.get(), entries.data(), bytes, at) != static_cast<ssize_t>(bytes)) return false;
    if (!std::all_of(entries.begin(), entries.begin() + static_cast<ptrdiff_t>(count), predicate)) return false;
    page += count;
  }
  return true;
}

bool BackedPages::has_all(const char* begin, size_t size) { return holds_for_all(begin, size, is_private); }

bool BackedPages::has_none(const char* begin, size_t size) { return holds_for_all(begin, size, is_none); }

}  // namespace weightload
