#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "base/look.h"
#include "threads/widening.h"

namespace weightload {

// Threads that work through numbered tasks in order, a bounded distance ahead of one consumer.
//
// Tasks start in order and may end out of order; the consumer sees them as done in order. The window counts
// bytes: a task may start once less than `window_bytes` lie between what the consumer needs and the task. The
// first task that fails (lowest number, not earliest in time) ends the work; the consumer gets its exception
// when it waits for that task or a later one, and still gets everything before it.
//
// One consumer thread at a time may call advance() and wait(); stop() may be called from anywhere.
//
// Where the system gives no thread at all, or no memory that a thread needs to begin, the consumer works through the
// tasks when it waits for them.
class OrderedPool {
 public:
  // `look` throws when nobody needs the task any more: the load was stopped, or an earlier task has failed. To be
  // called now and then by what takes long.
  using Work = std::function<void(size_t task, const Look& look)>;

  // `ends[t]` is the number of bytes of tasks 0 .. t together. Starts min(threads.most, tasks) threads, fewer when the
  // system gives no more. `pause` is called, too, where the consumer does the work and looks; it may throw, which ends
  // wait().
  OrderedPool(std::vector<uint64_t> ends, Threads threads, uint64_t window_bytes, Work work, Look pause = no_look);
  ~OrderedPool();  // stops and joins

  OrderedPool(const OrderedPool&) = delete;
  OrderedPool& operator=(const OrderedPool&) = delete;

  size_t thread_count() const { return threads_.size(); }

  // The consumer needs tasks up to `task` next. Cheap when the number has not grown.
  void advance(size_t task);

  // True once tasks 0 .. task are done. No lock, no wait.
  bool is_done(size_t task) const { return done_.load(std::memory_order_acquire) > task; }

  // Waits for tasks 0 .. task, at most `patience`: returns is_done(task). Rethrows the exception of the task
  // that failed among them. Returns false at once when stopped. Without threads it works, if there is any patience, and
  // ends a task that it has begun.
  bool wait(size_t task, std::chrono::milliseconds patience);

  // No further task starts; those in hand end when they look. Waiters wake. Does not wait for the threads.
  void stop() noexcept;

  // stop(), then waits for the threads to end.
  void join() noexcept;

 private:
  void run();
  bool work_here(size_t task, std::chrono::milliseconds patience);
  void look(size_t task) const;
  bool may_start(size_t task) const;  // with mutex_ held
  uint64_t bytes_of(size_t task) const { return ends_[task] - (task == 0 ? 0 : ends_[task - 1]); }
  bool nobody_works() const { return left_ == threads_.size(); }

  const std::vector<uint64_t> ends_;
  const uint64_t window_bytes_;
  const Work work_;
  const Look pause_;

  std::mutex mutex_;
  std::condition_variable room_;      // workers wait: the consumer has moved, or stop
  std::condition_variable progress_;  // the consumer waits: what it waits for is done, an error, or stop
  std::vector<bool> ended_;           // by task, guarded by mutex_
  size_t next_ = 0;                   // guarded by mutex_
  size_t running_ = 0;                // threads in a task; guarded by mutex_
  Widening widening_;                 // guarded by mutex_
  size_t awaited_ = SIZE_MAX;         // guarded by mutex_; what the consumer waits for, if it does
  std::atomic<bool> stopped_{false};  // written with mutex_ held, as the next
  std::atomic<size_t> failed_task_{SIZE_MAX};
  std::atomic<size_t> left_{0};    // threads that could not work; written with mutex_ held
  std::exception_ptr failure_;     // guarded by mutex_
  std::atomic<size_t> needed_{0};  // of advance(); written by the consumer with mutex_ held
  std::atomic<size_t> done_{0};    // tasks 0 .. done_-1 are done; written with mutex_ held

  bool working_here_ = false;  // the consumer's alone

  std::vector<std::thread> threads_;  // last: they use everything above
};

}  // namespace weightload
