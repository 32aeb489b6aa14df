#pragma once
#include <atomic>
#include <memory>

#include "base/fork_generation.h"

namespace weightload {

// What `current` points to, whose member `generation` is the fork_generation() it was made in. In a forked child it is
// replaced by a new one first: there a thread of the parent's, which the child does not have, may hold a mutex of its
// for ever, or have been in the middle of a change. The parent's is left as it is; destroying it might wait.
template <typename T>
T& of_this_process(std::atomic<T*>& current) {
  T* one = current.load();
  while (one->generation != fork_generation()) {
    auto mine = std::make_unique<T>();
    if (current.compare_exchange_strong(one, mine.get())) return *mine.release();
  }
  return *one;
}

// The process's one T. Never destroyed: threads may come after everything static has gone.
template <typename T>
T& of_this_process() {
  static std::atomic<T*> current{new T};
  return of_this_process(current);
}

}  // namespace weightload
