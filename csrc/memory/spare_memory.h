#pragma once
#include <cstdint>

#include "memory/huge_region.h"

namespace weightload::spare_memory {

// Memory in huge pages that no tensor uses any more, kept for the next load of the process.
//
// Memory fresh from the kernel costs a fault and 2 MiB of zeros a huge page, and on a virtual machine often a fault in
// the host as well: as much as the copy into it. What is kept is lent to the kernel (MADV_FREE): it takes the pages,
// without any I/O, as soon as anybody needs memory, and until then the next load finds them there. So nobody can run
// out of memory because of it; it shows in the process's resident size, and in MemAvailable as free. But nothing is
// kept under a limit of address space (RLIMIT_AS, RLIMIT_DATA, or vm.overcommit_memory=2 when the load began): there it
// would be what others lack.

// At most so many bytes are kept, from now on; all of the process.
void set_limit(uint64_t bytes) noexcept;

// A region of at least `size` bytes: kept memory, or from the kernel in such pages. Its contents are anything. Throws
// Error{memory}; not before all that is kept has been given up.
// `must_be_huge`: kept memory in single pages is of no use.
HugeRegion take(uint64_t size, Pages pages = Pages::huge, bool must_be_huge = false);

// Takes a region back: to keep, or for the kernel. What was kept longest goes first.
void give(const HugeRegion& region) noexcept;

// Gives all that is kept to the kernel: how many bytes. Any thread; in a forked child there is nothing, and it says 0.
uint64_t release() noexcept;

uint64_t kept_bytes() noexcept;

}  // namespace weightload::spare_memory
