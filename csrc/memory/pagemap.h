#pragma once
#include <fcntl.h>

#include <cstdint>

#include "base/uninterrupted.h"
#include "base/unique_fd.h"

namespace weightload {

// /proc/self/pagemap has an entry of eight bytes for each page of the process.
inline UniqueFd open_pagemap() {
  return UniqueFd(uninterrupted([] { return ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC); }));
}

inline constexpr uint64_t kPagePresent = 1ull << 63;
inline constexpr uint64_t kPageSwapped = 1ull << 62;
inline constexpr uint64_t kPageOfFile = 1ull << 61;  // or shared

}  // namespace weightload
