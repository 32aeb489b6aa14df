#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>

namespace weightload {

// Adds the time until its end to a counter of nanoseconds. Two readings of the clock: 50 ns, nothing beside a read.
class Stopwatch {
 public:
  explicit Stopwatch(std::atomic<uint64_t>& total) : total_(total) {}
  ~Stopwatch() {
    const auto elapsed = std::chrono::steady_clock::now() - begin_;
    total_.fetch_add(static_cast<uint64_t>(std::chrono::nanoseconds(elapsed).count()), std::memory_order_relaxed);
  }

  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  std::atomic<uint64_t>& total_;
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace weightload
