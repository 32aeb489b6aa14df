#pragma once
#include <cstddef>
#include <cstdint>

#include "base/pages.h"
#include "memory/page_prices.h"

namespace weightload {

// Anonymous memory from the kernel, in huge pages if they are not too dear.
struct HugeRegion {
  char* start = nullptr;  // a multiple of 2 MiB
  size_t used = 0;        // bytes, a multiple of 2 MiB
  Pages pages = Pages::huge;
  bool fresh = false;  // nobody has touched it
};

// Maps anonymous memory of at least `size` bytes, aligned to huge pages and advised to use them, or not to. Throws
// Error{memory}.
HugeRegion map_huge(uint64_t size, Pages pages);

// Advice only: where huge pages are switched off, or always taken, the memory works all the same. False where it would
// make more mappings than a process has.
bool advise(char* begin, size_t size, Pages pages) noexcept;

// Brings in every page of the range, which begins and ends at pages: 0, or an errno.
int fault_in(char* begin, size_t size) noexcept;

// The same for a huge page's worth, which has been advised to be of such pages, in the cheaper ones. What that has cost
// is recorded. Whether it could be done.
bool fault_in_cheaply(char* window, Pages advised, PagePrices& prices) noexcept;

void unmap_huge(const HugeRegion& region) noexcept;

}  // namespace weightload
