#pragma once
#include <atomic>
#include <cstdint>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

#include "base/fork_generation.h"

namespace weightload {

// For tests: from now on no thread can be had, as in a container that has used up its share.
inline std::atomic<bool>& threads_refused() {
  static std::atomic<bool> refused{false};
  return refused;
}

// Of a thread, in the process that it was marked in: a forked child begins with one that is nothing of all this.
class ThreadMark {
 public:
  void set() { generation_ = fork_generation() + 1; }
  bool is_set() const { return generation_ == fork_generation() + 1; }

 private:
  uint32_t generation_ = 0;
};

// Whether this thread is one of those that start_thread() has started.
inline ThreadMark& thread_of_the_core() {
  thread_local ThreadMark mark;
  return mark;
}

// The same, or one of Python's that loads wait for: in which nothing may wait for the end of a load.
inline ThreadMark& thread_of_loads() {
  thread_local ThreadMark mark;
  return mark;
}

// Starts a thread, or returns one that is not joinable where the system gives none: the caller then does the work.
template <typename Work>
std::thread start_thread(Work&& work) {
  if (threads_refused().load(std::memory_order_relaxed)) return {};
  try {
    return std::thread([work = std::forward<Work>(work)] {
      thread_of_the_core().set();
      thread_of_loads().set();
      work();
    });
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  return {};
}

}  // namespace weightload
