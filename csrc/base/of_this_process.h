#pragma once
#include <atomic>
#include <memory>

#include "base/fork_generation.h"

namespace weightload {

// The process's one T, whose member `generation` is the fork_generation() it was made in. Never destroyed: threads may
// come after everything static has gone. A forked child begins anew: there a thread of the parent's, which the child
// does not have, may hold a mutex of T's for ever.
template <typename T>
T& of_this_process() {
  static std::atomic<T*> current{new T};
  T* one = current.load();
  while (one->generation != fork_generation()) {
    auto mine = std::make_unique<T>();
    if (current.compare_exchange_strong(one, mine.get())) return *mine.release();
  }
  return *one;
}

}  // namespace weightload
