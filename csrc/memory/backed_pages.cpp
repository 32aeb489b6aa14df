#include "memory/backed_pages.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>

#include "base/pages.h"

namespace weightload {
namespace {

// In an entry of pagemap.
constexpr uint64_t kPresent = 1ull << 63;
constexpr uint64_t kOfFile = 1ull << 61;  // or shared

bool is_private(uint64_t entry) { return (entry & (kPresent | kOfFile)) == kPresent; }

}  // namespace

BackedPages::BackedPages() {
  int number;
  do {
    number = ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  } while (number < 0 && errno == EINTR);
  pagemap_ = UniqueFd(number);
}

bool BackedPages::has_all(const char* begin, size_t size) const {
  if (!pagemap_ || size == 0) return false;
  const auto first = reinterpret_cast<uintptr_t>(begin);
  const ByteRange pages = pages_around({first, first + size});
  std::array<uint64_t, kHugePage / 4096> entries;
  for (uint64_t page = pages.begin / page_bytes(), end = pages.end / page_bytes(); page < end;) {
    const auto count = static_cast<size_t>(std::min<uint64_t>(entries.size(), end - page));
    const size_t bytes = count * sizeof(entries[0]);
    const auto at = static_cast<off_t>(page * sizeof(entries[0]));
    if (::pread(pagemap_.get(), entries.data(), bytes, at) != static_cast<ssize_t>(bytes)) return false;
    if (!std::all_of(entries.begin(), entries.begin() + static_cast<ptrdiff_t>(count), is_private)) return false;
    page += count;
  }
  return true;
}

}  // namespace weightload
