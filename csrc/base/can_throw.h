#pragma once
#include <cstddef>
#include <cstdlib>
#include <exception>

namespace weightload {

// Whether the calling thread, which has just started, may throw. The C++ runtime keeps what it needs for that in
// thread-local memory, allocated when a thread throws for the first time; the C library ends the process where there is
// none left. So it is allocated here, after a trial: what that gives back is kept for this thread (glibc's tcache).
inline bool can_throw() noexcept {
  constexpr size_t kSeveralSizes[]{16, 32, 48, 64, 128, 256, 512, 1024};
  void* tried[sizeof(kSeveralSizes) / sizeof(size_t)];
  size_t count = 0;
  bool enough = true;
  for (const size_t size : kSeveralSizes) {
    tried[count] = std::malloc(size);
    enough = tried[count++] != nullptr;
    if (!enough) break;
  }
  while (count > 0) std::free(tried[--count]);
  if (!enough) return false;
  const volatile int allocated = std::uncaught_exceptions();
  static_cast<void>(allocated);
  return true;
}

}  // namespace weightload
