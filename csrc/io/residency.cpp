#include "io/residency.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "base/pages.h"

namespace weightload {
namespace {

constexpr long kCachestat = 451;  // the system call's number on every architecture; absent from older headers

constexpr uint64_t kMincorePiece = 1ull << 30;

struct CachestatRange {
  uint64_t offset;
  uint64_t length;
};
struct Cachestat {
  uint64_t cached, dirty, writeback, evicted, recently_evicted;
};

// The bytes of `range` in `pages` of the pages around it: exact when all or none are cached.
uint64_t clip(uint64_t pages, ByteRange range) { return std::min(range.size(), pages * page_bytes()); }

// mincore answers "all cached" to those who may not know (mm/mincore.c, can_do_mincore).
bool may_ask_mincore(const File& file) {
  const open_files::Lease lease = file.descriptor();
  struct stat status;
  if (::fstat(lease.get(), &status) != 0) return false;
  return ::geteuid() == 0 || status.st_uid == ::geteuid() ||
         ::faccessat(AT_FDCWD, ("/proc/self/fd/" + std::to_string(lease.get())).c_str(), W_OK, AT_EACCESS) == 0;
}

}  // namespace

std::optional<uint64_t> cached_bytes_by_cachestat(const File& file, ByteRange range) {
  if (range.empty()) return 0;
  CachestatRange asked{range.begin, range.size()};
  Cachestat answer{};
  if (::syscall(kCachestat, file.descriptor().get(), &asked, &answer, 0) != 0) return std::nullopt;
  // overlayfs has the pages in the file below, and asks its own file, which has none (seen with Linux 6.18).
  if (answer.cached == 0 && file.file_system() == OVERLAYFS_SUPER_MAGIC) return std::nullopt;
  return clip(answer.cached, range);
}

std::optional<uint64_t> cached_bytes_by_mincore(const File& file, ByteRange range, char* mapping) {
  if (range.empty()) return 0;
  if (!may_ask_mincore(file)) return std::nullopt;
  std::vector<unsigned char> pages;
  uint64_t cached = 0;
  // Piece by piece: the answer is a byte a page, which of a sparse giant would not fit into memory.
  for (uint64_t begin = round_down(range.begin, page_bytes()); begin < range.end; begin += kMincorePiece) {
    const size_t length = static_cast<size_t>(std::min(kMincorePiece, range.end - begin));
    void* const asked =
        mapping ? mapping + begin
                : ::mmap(nullptr, length, PROT_READ, MAP_PRIVATE, file.descriptor().get(), static_cast<off_t>(begin));
    if (asked == MAP_FAILED) return std::nullopt;
    pages.resize((length + page_bytes() - 1) / page_bytes());
    const bool answered = ::mincore(asked, length, pages.data()) == 0;
    if (!mapping) ::munmap(asked, length);
    if (!answered) return std::nullopt;
    const auto here = std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; });
    cached += static_cast<uint64_t>(here);
  }
  return clip(cached, range);
}

std::optional<uint64_t> cached_bytes(const File& file, ByteRange range, char* mapping) {
  const auto answer = cached_bytes_by_cachestat(file, range);
  return answer ? answer : cached_bytes_by_mincore(file, range, mapping);
}

}  // namespace weightload
