#pragma once
#include <time.h>

#include <chrono>

namespace weightload {

// std::chrono::steady_clock, good to a few milliseconds, behind rather than ahead, and five times as cheap.
inline std::chrono::steady_clock::time_point coarse_now() {
  struct timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return std::chrono::steady_clock::time_point(std::chrono::seconds(now.tv_sec) +
                                               std::chrono::nanoseconds(now.tv_nsec));
}

}  // namespace weightload
