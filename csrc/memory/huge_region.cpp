#include "memory/huge_region.h"

#include <sys/mman.h>

#include <cerrno>
#include <string>

#include "base/byte_range.h"
#include "base/error.h"

namespace weightload {

HugeRegion map_huge(uint64_t size) {
  HugeRegion region;
  // Over-allocate by one huge page to find an aligned start; the slack is address space, never touched.
  region.used = round_up(size, kHugePage);
  region.mapped = region.used + kHugePage;
  // The kernel is to count it (no MAP_NORESERVE): more than the machine has, as a sparse file may call for, is then
  // refused here, where otherwise filling it would get the process killed.
  region.mapping = ::mmap(nullptr, region.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (region.mapping == MAP_FAILED) {
    throw Error(ErrorKind::memory, "cannot allocate " + std::to_string(size) + " bytes of host memory",
                {{}, {}, {}, errno});
  }
  region.start = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(region.mapping), kHugePage));
  // Advice only: where huge pages are switched off the memory works as before, slower to fill.
  ::madvise(region.start, region.used, MADV_HUGEPAGE);
  return region;
}

void unmap_huge(const HugeRegion& region) noexcept { ::munmap(region.mapping, region.mapped); }

}  // namespace weightload
