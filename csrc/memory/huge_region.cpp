#include "memory/huge_region.h"

#include <sys/mman.h>

#include <cerrno>
#include <chrono>
#include <string>

#include "base/byte_range.h"
#include "base/error.h"
#include "base/uninterrupted.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace weightload {
HugeRegion map_huge(uint64_t size, Pages pages) {
  HugeRegion region;
  region.pages = pages;
  region.fresh = true;
  region.used = round_up(size, kHugePage);
  // The kernel is to count it (no MAP_NORESERVE): more than the machine has, as a sparse file may call for, is then
  // refused here, where otherwise filling it would get the process killed. One huge page more, to find an aligned
  // start.
  const size_t mapped = region.used + kHugePage;
  void* const mapping = ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) {
    throw Error(ErrorKind::memory, "cannot allocate " + std::to_string(size) + " bytes of host memory",
                {{}, {}, {}, errno});
  }
  char* const begin = static_cast<char*>(mapping);
  region.start = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(mapping), kHugePage));
  // What lies around it goes back, so that parts of a region can be let go by themselves.
  if (region.start > begin) ::munmap(begin, static_cast<size_t>(region.start - begin));
  char* const end = region.start + region.used;
  if (end < begin + mapped) ::munmap(end, static_cast<size_t>(begin + mapped - end));
  advise(region.start, region.used, pages);
  return region;
}

bool advise(char* begin, size_t size, Pages pages) noexcept {
  return ::madvise(begin, size, pages == Pages::huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) == 0 || errno != ENOMEM;
}

int fault_in(char* begin, size_t size) noexcept {
  return uninterrupted([&] { return ::madvise(begin, size, MADV_POPULATE_WRITE); }) == 0 ? 0 : errno;
}

bool fault_in_cheaply(char* window, Pages advised, PagePrices& prices) noexcept {
  const Pages pages = prices.choose();
  if (pages != advised && !advise(window, kHugePage, pages)) return false;
  const auto begin = std::chrono::steady_clock::now();
  if (fault_in(window, kHugePage) != 0) return false;
  prices.record(pages, std::chrono::steady_clock::now() - begin);
  return true;
}

void unmap_huge(const HugeRegion& region) noexcept { ::munmap(region.start, region.used); }

}  // namespace weightload
