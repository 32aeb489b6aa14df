#pragma once
#include <chrono>
#include <cstddef>

#include "base/look.h"

namespace weightload {

// How long nothing may come, and how often a wait looks whether it is still wanted.
struct Patience {
  std::chrono::milliseconds limit;
  std::chrono::milliseconds between_looks;
};

// Waits until something has come on a connected socket, or its end; false if nothing does within the limit.
bool wait_for_bytes(int socket, const Patience& patience, const Look& look);

// Fills [destination, destination + count) with what comes next; false if it ends, fails, or stands still first.
bool receive(int socket, void* destination, size_t count, const Patience& patience, const Look& look);

}  // namespace weightload
