#pragma once
#include <cstddef>
#include <cstdint>

namespace weightload {

inline constexpr size_t kHugePage = 2u << 20;  // of x86-64, and of arm64 with 4 KiB pages; elsewhere just an alignment

// Anonymous memory with huge pages, from the kernel: [start, start + used) lies in [mapping, mapping + mapped).
struct HugeRegion {
  char* start = nullptr;
  size_t used = 0;  // a multiple of 2 MiB
  void* mapping = nullptr;
  size_t mapped = 0;
};

// Maps anonymous memory of at least `size` bytes, aligned to huge pages and advised to use them. Throws
// Error{memory}.
HugeRegion map_huge(uint64_t size);
void unmap_huge(const HugeRegion& region) noexcept;

}  // namespace weightload
