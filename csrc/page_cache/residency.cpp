#include "page_cache/residency.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <string>
#include <vector>

#include "base/pages.h"
#include "file/file_system.h"
#include "page_cache/major_faults.h"
#include "page_cache/page_tables.h"

namespace weightload {
namespace {

constexpr long kCachestat = 451;  // the system call's number on every architecture; absent from older headers

constexpr uint64_t kMincorePiece = 1ull << 30;

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8  // Linux 4.14
#endif

// Of seems_cached_by_reads and _by_faults: one page of each so many bytes, 0.4 us and 1 us a page.
constexpr uint64_t kLookEvery = 1 << 20;
constexpr uint64_t kMostLooks = 32;

// Bits of File::refusals().
constexpr uint8_t kNoCachestat = 1, kNoMincore = 2, kNoReads = 4, kInMemory = 8, kNoFaults = 16;

bool refused(const File& file, uint8_t way) { return (file.refusals().load(std::memory_order_relaxed) & way) != 0; }
void refuse(const File& file, uint8_t way) { file.refusals().fetch_or(way, std::memory_order_relaxed); }

struct CachestatRange {
  uint64_t offset;
  uint64_t length;
};
struct Cachestat {
  uint64_t cached, dirty, writeback, evicted, recently_evicted;
};

// The bytes of `range` in `pages` of the pages around it: exact when all or none are cached. A small range may have
// more pages than would hold it.
uint64_t clip(uint64_t pages, ByteRange range) {
  const uint64_t bytes = std::min(range.size(), pages * page_bytes());
  return pages * page_bytes() < pages_around(range).size() ? std::min(bytes, range.size() - 1) : bytes;
}

// mincore answers "all cached" to those who may not know (mm/mincore.c, can_do_mincore).
bool may_ask_mincore(const File& file) {
  const open_files::Lease lease = file.descriptor();
  struct stat status;
  if (::fstat(lease.get(), &status) != 0) return false;
  return ::geteuid() == 0 || status.st_uid == ::geteuid() ||
         ::faccessat(AT_FDCWD, ("/proc/self/fd/" + std::to_string(lease.get())).c_str(), W_OK, AT_EACCESS) == 0;
}

bool may_be_overlay(const File& file) {
  return file.file_system() == 0 || file.file_system() == OVERLAYFS_SUPER_MAGIC;  // 0: not known
}

// A place in each stride, another one at each call. With a good hash's constant (the golden ratio) calls after each
// other lie well apart.
uint64_t next_place(uint64_t stride) {
  static std::atomic<uint64_t> calls{0};
  return (calls.fetch_add(1, std::memory_order_relaxed) * 0x9e3779b97f4a7c15u >> 20) % stride;
}

// Calls is_there(offset) for some bytes of the range, until one is not, or nobody knows.
template <typename IsThere>
std::optional<bool> each_place(ByteRange range, IsThere&& is_there) {
  const uint64_t count = std::clamp<uint64_t>(range.size() / kLookEvery, 2, kMostLooks);
  const uint64_t stride = std::max<uint64_t>(1, range.size() / count);
  for (uint64_t begin = range.begin; begin < range.end; begin += stride) {
    const std::optional<bool> there = is_there(begin + next_place(std::min(stride, range.end - begin)));
    if (there != true) return there;
  }
  return true;
}

}  // namespace

std::optional<uint64_t> cached_bytes_by_cachestat(const File& file, ByteRange range) {
  if (range.empty()) return 0;
  CachestatRange asked{range.begin, range.size()};
  Cachestat answer{};
  const bool answered = ::syscall(kCachestat, file.descriptor().get(), &asked, &answer, 0) == 0;
  // overlayfs has the pages in the file below, and asks its own file, which has none (seen with Linux 6.18).
  if (answered && (answer.cached > 0 || !may_be_overlay(file))) return clip(answer.cached, range);
  refuse(file, kNoCachestat);
  return std::nullopt;
}

std::optional<uint64_t> cached_bytes_by_mincore(const File& file, ByteRange range, char* mapping) {
  if (range.empty()) return 0;
  const auto count = [&]() -> std::optional<uint64_t> {
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
  };
  const auto cached = count();
  if (!cached) refuse(file, kNoMincore);
  return cached;
}

// Note [Files of others]
// The normal case of a model cache: root filled it, a service user loads from it. Of such files the kernel does not say
// what is in the page cache. But it reads from it: a read that must not wait (RWF_NOWAIT) gives a byte where the page
// is there, and EAGAIN where it is not. So some pages are read from.
//
// On some kernels (seen with 6.18) such a read begins to bring in the page that was not there, and a page that is there
// keeps a huge one from being made of its neighbours (Note [Populate, then read]). So the first that is missing is the
// last that is asked for; no two calls ask for the same pages, or the second would find those that the first has
// brought in; and page_in() does not ask this way.
//
// Network, overlay and user-space file systems do not know this flag (EOPNOTSUPP). There some pages are mapped, in a
// mapping that reads nothing else: a page that is there costs no major fault. One that is not is read, which takes as
// long as storage takes for a page. Not in user space, where that may be anything.
std::optional<bool> seems_cached_by_reads(const File& file, ByteRange range) {
  return each_place(range, [&](uint64_t at) -> std::optional<bool> {
    char byte;
    struct iovec place{&byte, 1};
    const ssize_t got = ::preadv2(file.descriptor().get(), &place, 1, static_cast<off_t>(at), RWF_NOWAIT);
    if (got == 1) return true;
    if (got == 0 || errno == EAGAIN || errno == EINTR) return false;
    return std::nullopt;
  });
}

std::optional<bool> seems_cached_by_faults(const File& file, ByteRange range) {
  if (range.empty()) return true;
  const ByteRange pages = pages_around(range);
  const auto length = static_cast<size_t>(pages.size());
  void* const mapping = ::mmap(nullptr, length, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, file.descriptor().get(),
                               static_cast<off_t>(pages.begin));
  if (mapping == MAP_FAILED) return std::nullopt;
  ::madvise(mapping, length, MADV_RANDOM);
  const MajorFaults faults;
  const auto seems = each_place(range, [&](uint64_t at) {
    return PageTables::was_there(static_cast<char*>(mapping) + round_down(at - pages.begin, page_bytes()), faults);
  });
  ::munmap(mapping, length);
  return seems;
}

std::optional<uint64_t> cached_bytes(const File& file, ByteRange range, char* mapping) {
  if (!refused(file, kNoCachestat)) {
    if (const auto answer = cached_bytes_by_cachestat(file, range)) return answer;
  }
  return refused(file, kNoMincore) ? std::nullopt : cached_bytes_by_mincore(file, range, mapping);
}

std::optional<bool> seems_cached(const File& file, ByteRange range, char* mapping) {
  if (const auto cached = cached_bytes(file, range, mapping)) return *cached == range.size();
  if (!refused(file, kNoReads)) {
    if (const auto seems = seems_cached_by_reads(file, range)) return seems;
    const Storage storage = storage_of(file);
    // At once: another thread must not take the one for all that is known.
    refuse(file, kNoReads | (storage == Storage::memory ? kInMemory : storage == Storage::user_space ? kNoFaults : 0));
  }
  if (refused(file, kInMemory)) return true;
  if (!refused(file, kNoFaults)) {
    if (const auto seems = seems_cached_by_faults(file, range)) return seems;
    refuse(file, kNoFaults);
  }
  return std::nullopt;
}

bool bypasses_page_cache(const File& file) {
  if (file.size() == 0 || storage_of(file) != Storage::user_space) return false;
  const auto cached = cached_bytes(file, {0, 1});
  return cached && *cached == 0;
}

}  // namespace weightload
