#include "threads/ordered_pool.h"

#include <cxxabi.h>

#include <algorithm>
#include <utility>

#include "base/can_throw.h"
#include "base/error.h"
#include "base/start_thread.h"
#include "base/thread_name.h"

namespace weightload {

OrderedPool::OrderedPool(std::vector<uint64_t> ends, Threads threads, uint64_t window_bytes, Work work, Look pause)
    : ends_(std::move(ends)),
      window_bytes_(window_bytes),
      work_(std::move(work)),
      pause_(std::move(pause)),
      ended_(ends_.size(), false),
      widening_({std::max(threads.at_first, 1u), std::max(threads.most, 1u)}) {
  const size_t count = std::min<size_t>(std::max(threads.most, 1u), ends_.size());
  threads_.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    std::thread thread = start_thread([this] { run(); });
    if (!thread.joinable()) break;  // those that started are enough; without any the consumer works
    threads_.push_back(std::move(thread));
  }
}

OrderedPool::~OrderedPool() { join(); }

void OrderedPool::advance(size_t task) {
  if (task <= needed_.load(std::memory_order_relaxed)) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    needed_.store(task, std::memory_order_relaxed);
  }
  room_.notify_all();
}

bool OrderedPool::wait(size_t task, std::chrono::milliseconds patience) {
  if (is_done(task)) return true;
  if (nobody_works()) return work_here(task, patience);
  std::unique_lock<std::mutex> lock(mutex_);
  // An error counts once everything before it is done, so that the lowest one is the one that is thrown.
  const auto failed = [&] { return failure_ && failed_task_ <= task && done_.load() == failed_task_; };
  awaited_ = task;
  progress_.wait_for(lock, patience, [&] { return is_done(task) || failed() || stopped_ || nobody_works(); });
  awaited_ = SIZE_MAX;
  if (is_done(task)) return true;
  if (failed()) std::rethrow_exception(failure_);
  lock.unlock();
  return nobody_works() && work_here(task, patience);
}

// A signal's handler, which `pause` may have called, could come back here in the middle of a task.
bool OrderedPool::work_here(size_t task, std::chrono::milliseconds patience) {
  if (working_here_) throw Error(ErrorKind::usage, "the load is being continued by whom this interrupts");
  const auto until = std::chrono::steady_clock::now() + patience;
  working_here_ = true;
  const struct AtEnd {
    bool& working;
    ~AtEnd() { working = false; }
  } at_end{working_here_};
  while (!is_done(task)) {
    if (stopped_ || next_ == ends_.size()) return false;
    if (failure_) std::rethrow_exception(failure_);
    if (std::chrono::steady_clock::now() >= until) return false;
    const size_t mine = next_;
    bool by_pause = false;
    try {
      work_(mine, [this, mine, &by_pause] {
        look(mine);
        by_pause = true;
        pause_();
        by_pause = false;
        look(mine);
      });
    } catch (...) {
      if (stopped_ && !by_pause) return false;  // a signal's handler may stop the load and raise, too
      failed_task_ = mine;
      failure_ = std::current_exception();
      throw;
    }
    done_.store(++next_, std::memory_order_release);
  }
  return true;
}

void OrderedPool::look(size_t task) const {
  if (stopped_ || failed_task_ < task) throw Error(ErrorKind::usage, "the load was stopped");
}

void OrderedPool::stop() noexcept {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
  }
  room_.notify_all();
  progress_.notify_all();
}

void OrderedPool::join() noexcept {
  stop();
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

bool OrderedPool::may_start(size_t task) const {
  const size_t needed = needed_.load(std::memory_order_relaxed);
  return task <= needed || ends_[task - 1] - ends_[needed] < window_bytes_;
}

void OrderedPool::run() {
  name_this_thread();
  const bool works = can_throw();
  std::unique_lock<std::mutex> lock(mutex_);
  if (!works) {
    ++left_;
    progress_.notify_all();
    return;
  }
  while (true) {
    const auto is_over = [&] { return stopped_ || failure_ || next_ == ends_.size(); };
    if (!is_over() && running_ < widening_.width() && !may_start(next_)) widening_.starved();
    room_.wait(lock, [&] { return is_over() || (running_ < widening_.width() && may_start(next_)); });
    if (is_over()) return;
    const size_t task = next_++;
    ++running_;
    const unsigned step = widening_.step();
    // Others must see that nothing is left to wait for.
    if (next_ == ends_.size()) room_.notify_all();
    lock.unlock();
    const auto begun = std::chrono::steady_clock::now();
    std::exception_ptr failure;
    try {
      work_(task, [this, task] { look(task); });
    } catch (const abi::__forced_unwind&) {
      throw;  // the interpreter has ended while the work waited for the GIL, and ends the thread
    } catch (...) {
      failure = std::current_exception();
    }
    const Widening::Seconds took = std::chrono::steady_clock::now() - begun;
    lock.lock();
    --running_;
    if (failure) {
      if (task < failed_task_ && !stopped_) {
        failed_task_ = task;
        failure_ = std::move(failure);
      }
      room_.notify_all();
      progress_.notify_all();
      continue;
    }
    if (widening_.ended(step, bytes_of(task), took)) room_.notify_all();
    ended_[task] = true;
    size_t done = done_.load(std::memory_order_relaxed);
    if (task != done) continue;
    while (done < ended_.size() && ended_[done]) ++done;
    done_.store(done, std::memory_order_release);
    // Not for every task: on a busy machine the consumer would take a worker's place to find that it must wait on.
    if (done > awaited_ || failure_) progress_.notify_all();
  }
}

}  // namespace weightload
