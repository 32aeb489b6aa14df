#include "memory/backed_pages.h"

#include <sys/mman.h>

#include <cstdint>

#include "base/pages.h"

namespace weightload {
namespace {

bool has_page(uintptr_t at) {
  unsigned char resident = 0;
  void* const page = reinterpret_cast<void*>(round_down(at, page_bytes()));
  return ::mincore(page, static_cast<size_t>(page_bytes()), &resident) == 0 && (resident & 1) != 0;
}

}  // namespace

bool is_backed(const char* begin, size_t size) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  return size > 0 && has_page(first) && has_page(first + size - 1);
}

}  // namespace weightload
