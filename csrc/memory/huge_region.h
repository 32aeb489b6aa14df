#pragma once
#include <cstddef>
#include <cstdint>

namespace weightload {

inline constexpr size_t kHugePage = 2u << 20;  // of x86-64, and of arm64 with 4 KiB pages; elsewhere just an alignment

// Anonymous memory with huge pages, from the kernel.
struct HugeRegion {
  char* start = nullptr;  // a multiple of 2 MiB
  size_t used = 0;        // bytes, a multiple of 2 MiB
};

// Maps anonymous memory of at least `size` bytes, aligned to huge pages and advised to use them. Throws
// Error{memory}.
HugeRegion map_huge(uint64_t size);
void unmap_huge(const HugeRegion& region) noexcept;

}  // namespace weightload
