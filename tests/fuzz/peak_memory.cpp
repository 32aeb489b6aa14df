#include "peak_memory.h"

#include <algorithm>
#include <cstddef>

#include "require.h"

// clang's sanitizer/allocator_interface.h. g++ has the functions, but not the header.
extern "C" {
int __sanitizer_install_malloc_and_free_hooks(void (*malloc_hook)(const volatile void*, size_t),
                                              void (*free_hook)(const volatile void*));
size_t __sanitizer_get_allocated_size(const volatile void* address);
}

namespace {

bool counting = false;
int64_t live = 0;  // less than nothing where memory of before is freed
int64_t peak = 0;

void allocated(const volatile void*, size_t size) {
  if (!counting) return;
  live += static_cast<int64_t>(size);
  peak = std::max(peak, live);
}

void freed(const volatile void* address) {
  if (counting && address) live -= static_cast<int64_t>(__sanitizer_get_allocated_size(address));
}

}  // namespace

PeakMemory::PeakMemory() {
  static const int installed = __sanitizer_install_malloc_and_free_hooks(allocated, freed);
  REQUIRE(installed != 0 && !counting);
  live = peak = 0;
  counting = true;
}

PeakMemory::~PeakMemory() { counting = false; }

uint64_t PeakMemory::bytes() const { return static_cast<uint64_t>(peak); }
