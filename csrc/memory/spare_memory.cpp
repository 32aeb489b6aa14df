#include "memory/spare_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "base/byte_range.h"
#include "base/error.h"
#include "base/fork_generation.h"
#include "base/unique_fd.h"

namespace weightload::spare_memory {
namespace {

#ifdef MADV_FREE
constexpr int kLendToKernel = MADV_FREE;
#else
constexpr int kLendToKernel = MADV_DONTNEED;
#endif

struct Spares {
  const uint32_t generation = fork_generation();
  std::mutex mutex;                 // guards all below
  std::vector<HugeRegion> regions;  // the longest kept first
  uint64_t bytes = 0;
  uint64_t limit = 0;
};

// Never destroyed: tensors may go after everything static has. In a forked child a thread of the parent may hold the
// mutex for ever; the child keeps nothing, and null is returned.
Spares* spares() {
  static Spares* const all = new Spares;
  return all->generation == fork_generation() ? all : nullptr;
}

// Whether the process may have so much address space, or memory that is promised to it, and no more: what is kept would
// be what others lack, and that it is lent to the kernel does not help them. Asked each time: a limit may be set at
// any.
bool is_limited() noexcept {
  for (const auto what : {RLIMIT_AS, RLIMIT_DATA}) {
    struct rlimit limit;
    if (::getrlimit(what, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) return true;
  }
  return false;
}

// The same of the whole machine (vm.overcommit_memory=2).
bool is_counted_strictly() noexcept {
  char mode = '0';
  const UniqueFd file(::open("/proc/sys/vm/overcommit_memory", O_RDONLY | O_CLOEXEC));
  return file && ::read(file.get(), &mode, 1) == 1 && mode == '2';
}

// With the mutex held, as all below with a Spares&.
void shrink(Spares& all, uint64_t most) noexcept {
  auto last = all.regions.begin();
  for (; all.bytes > most; ++last) {
    all.bytes -= last->used;
    unmap_huge(*last);
  }
  all.regions.erase(all.regions.begin(), last);
}

// Together with the regions that it touches, which may be a larger one's parts.
HugeRegion joined(Spares& all, HugeRegion region) noexcept {
  const auto touches = [&](const HugeRegion& other) {
    const bool before = other.start + other.used == region.start, behind = region.start + region.used == other.start;
    if (before) region.start = other.start;
    if (!before && !behind) return false;
    region.used += other.used;
    if (other.pages == Pages::single) region.pages = Pages::single;
    return true;
  };
  // One pass: of two neighbours that are kept already none touches another.
  all.regions.erase(std::remove_if(all.regions.begin(), all.regions.end(), touches), all.regions.end());
  return region;
}

// The front of the smallest that is large enough.
bool find(uint64_t size, bool must_be_huge, HugeRegion& found) {
  Spares* const all = spares();
  if (!all) return false;
  std::lock_guard<std::mutex> lock(all->mutex);
  auto best = all->regions.end();
  for (auto it = all->regions.begin(); it != all->regions.end(); ++it) {
    if (must_be_huge && it->pages != Pages::huge) continue;
    if (it->used >= size && (best == all->regions.end() || it->used < best->used)) best = it;
  }
  if (best == all->regions.end()) return false;
  found = {best->start, size, best->pages, false};
  best->start += size;
  best->used -= size;
  all->bytes -= size;
  if (best->used == 0) all->regions.erase(best);
  return true;
}

HugeRegion from_kernel(uint64_t size, Pages pages) {
  try {
    return map_huge(size, pages);
  } catch (const Error&) {
    if (kept_bytes() == 0) throw;
    release();
    return map_huge(size, pages);
  }
}

}  // namespace

void set_limit(uint64_t bytes) noexcept {
  Spares* const all = spares();
  if (!all) return;
  if (bytes > 0 && (is_limited() || is_counted_strictly())) bytes = 0;
  std::lock_guard<std::mutex> lock(all->mutex);
  all->limit = bytes;
  shrink(*all, bytes);
}

HugeRegion take(uint64_t size, Pages pages, bool must_be_huge) {
  HugeRegion region;
  if (!find(round_up(size, kHugePage), must_be_huge, region)) region = from_kernel(size, pages);
  // A few bytes beyond a huge page must not cost another one.
  const uint64_t tail = size % kHugePage;
  if (tail > 0 && tail <= kHugePage / 2) ::madvise(region.start + (size - tail), kHugePage, MADV_NOHUGEPAGE);
  return region;
}

void give(const HugeRegion& region) noexcept {
  // `pages` stays as it is: what is there is not moved. What the kernel takes is to come back in huge ones.
  if (is_limited()) {
    unmap_huge(region);
    release();
    return;
  }
  ::madvise(region.start, region.used, MADV_HUGEPAGE);
  // Lent before anyone else can take it. Locked memory cannot be, and is not kept.
  if (Spares* const all = spares(); all && ::madvise(region.start, region.used, kLendToKernel) == 0) {
    std::lock_guard<std::mutex> lock(all->mutex);
    try {
      all->regions.reserve(all->regions.size() + 1);
      all->regions.push_back(joined(*all, region));
      all->bytes += region.used;
      shrink(*all, all->limit);
      return;
    } catch (const std::bad_alloc&) {
      // then it goes back to the kernel
    }
  }
  unmap_huge(region);
}

uint64_t release() noexcept {
  Spares* const all = spares();
  if (!all) return 0;
  std::vector<HugeRegion> leaving;
  uint64_t bytes = 0;
  {
    std::lock_guard<std::mutex> lock(all->mutex);
    leaving.swap(all->regions);
    std::swap(bytes, all->bytes);
  }
  for (const HugeRegion& region : leaving) unmap_huge(region);
  return bytes;
}

uint64_t kept_bytes() noexcept {
  Spares* const all = spares();
  if (!all) return 0;
  std::lock_guard<std::mutex> lock(all->mutex);
  return all->bytes;
}

}  // namespace weightload::spare_memory
