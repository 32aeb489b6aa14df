#pragma once
#include <atomic>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

namespace weightload {

// For tests: from now on no thread can be had, as in a container that has used up its share.
inline std::atomic<bool>& threads_refused() {
  static std::atomic<bool> refused{false};
  return refused;
}

// Whether this thread is one of those that start_thread() has started.
inline bool& is_thread_of_the_core() {
  thread_local bool is = false;
  return is;
}

// Starts a thread, or returns one that is not joinable where the system gives none: the caller then does the work.
template <typename Work>
std::thread start_thread(Work&& work) {
  if (threads_refused().load(std::memory_order_relaxed)) return {};
  try {
    return std::thread([work = std::forward<Work>(work)] {
      is_thread_of_the_core() = true;
      work();
    });
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  return {};
}

}  // namespace weightload
