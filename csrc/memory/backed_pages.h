#pragma once
#include <cstddef>

namespace weightload {

// Whether the first and the last page of memory are there, as far as the kernel says: not memory that nobody has
// touched yet. Two system calls.
bool is_backed(const char* begin, size_t size);

}  // namespace weightload
