#pragma once
#include <cstdint>
#include <memory>

#include "base/fork_generation.h"

namespace weightload {

// Deletes, but not in a child that was forked since it was made. There a thread of the parent's, which the child does
// not have, may hold a mutex of the object's for ever, or wait on it, and a device's driver or a communicator is the
// parent's: the object stays as it is, and the child keeps its memory.
struct DeleteUnlessForked {
  uint32_t generation = fork_generation();

  template <typename T>
  void operator()(T* object) const {
    if (generation == fork_generation()) delete object;
  }
};

template <typename T>
using ForkOwned = std::unique_ptr<T, DeleteUnlessForked>;

}  // namespace weightload
