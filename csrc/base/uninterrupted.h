#pragma once
#include <cerrno>

namespace weightload {

// A system call that is made again where a signal interrupted it: of a file system in user space, even stat() may be.
// Not for ever, as a sandbox may answer EINTR each time. `call` returns something negative for a failure, with errno.
template <typename Call>
auto uninterrupted(Call&& call) {
  constexpr int kMostTries = 100;
  for (int tries = 1;; ++tries) {
    const auto result = call();
    if (result >= 0 || errno != EINTR || tries == kMostTries) return result;
  }
}

}  // namespace weightload
