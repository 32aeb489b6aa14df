#pragma once
#include <driver_types.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "checker.h"
#include "clock.h"

namespace simulated {

// A point in a stream's work that others can wait for: what events are made of.
class Moment {
 public:
  explicit Moment(Clock clock) : clock_(std::move(clock)) {}
  void reach();
  bool reached() const;
  void wait() const;
  const Clock& clock() const { return clock_; }  // what lies before it
  std::chrono::steady_clock::time_point time() const;

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool reached_ = false;
  std::chrono::steady_clock::time_point time_;
  const Clock clock_;
};
using MomentRef = std::shared_ptr<const Moment>;

// A queue of operations and the thread that runs them in order, each after a random delay: as late as a busy device,
// and out of step with every other stream. The thread begins with the first operation.
class Stream {
 public:
  Stream(int device, unsigned flags, int priority);

  const int device;
  const unsigned flags;
  const int priority;
  const uint64_t id;

  bool idle() const;
  std::string name() const;

  // With the order lock held.
  void push(std::function<void()> operation);
  size_t number();  // in clocks; allotted at the first call
  Clock clock;

  void retire();  // runs what is queued; then its thread ends

 private:
  void run();
  void pause();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool running_ = false, retired_ = false, started_ = false;
  std::shared_ptr<Stream> self_;  // the thread's, while it runs
  std::mt19937_64 random_;
  uint64_t seeded_ = 0;
  size_t number_ = SIZE_MAX;
};
using StreamRef = std::shared_ptr<Stream>;

// Orders everything that is queued, by any thread, on any stream; guards clocks and the checker.
std::mutex& order_lock();
Checker& checker();   // with the lock held
Clock& host_clock();  // with the lock held

// Makes a stream's handle, finds what a handle means (0 and its two special values are the current device's), ends it.
cudaStream_t open_stream(int device, unsigned flags, int priority);
StreamRef find_stream(cudaStream_t handle);  // null: there is none
bool close_stream(cudaStream_t handle);
std::vector<StreamRef> streams_of(int device);
StreamRef legacy_stream(int device);

// Queues an operation with what it reads and writes. `before`: what else it lies behind (a communicator's last), and
// `after`, if not null, becomes what it lies behind itself.
void enqueue(const StreamRef& stream, const char* what, const std::vector<Access>& accesses, std::function<void()> run,
             const Clock* before = nullptr, Clock* after = nullptr);
MomentRef mark(const StreamRef& stream);
void wait_for(const StreamRef& stream, const MomentRef& moment);

// The host waits, or finds that it need not: it knows of what lies before then.
void host_wait(const Moment& moment);
bool host_query(const Moment& moment);
void host_learns(const Clock& clock);
void synchronize(const StreamRef& stream);
void synchronize_device(int device);

// The delays that follow come from this seed: at most `longest` microseconds, most of them below a tenth of it.
void seed_delays(uint64_t seed, uint64_t longest_us);
// A stream stops before its next operation until the returned function is called.
std::function<void()> hold(const StreamRef& stream);

bool forked();  // in a child of a process that used the device: nothing works there

}  // namespace simulated
