#include "threads/pace.h"

namespace weightload {

Pace::Pace(unsigned readers, uint64_t most_bytes, Now now)
    : most_(most_bytes), now_(now), rule_(readers, most_bytes), piece_(rule_.piece()) {}

Pace::Pace(Unpaced)
    : most_(std::numeric_limits<uint64_t>::max()),
      now_(&Clock::now),
      learns_(false),
      rule_(kAnyNumber, most_),
      piece_(most_),
      fast_(true) {}

Pace::Turn::Turn(Pace& pace) : pace_(pace) {
  if (pace_.fast_.load(std::memory_order_relaxed)) {
    most_ = pace_.piece_.load(std::memory_order_relaxed);
  } else {
    std::unique_lock<std::mutex> lock(pace_.mutex_);
    pace_.turns_.wait(lock, [&] { return pace_.active_ < pace_.rule_.allowed() || pace_.stopped_; });
    ++pace_.active_;
    counted_ = true;
    full_ = pace_.active_ >= pace_.rule_.allowed();
    most_ = pace_.rule_.piece();
    epoch_ = pace_.rule_.epoch();
  }
  begin_ = pace_.now_();
}

Pace::Turn::~Turn() {
  if (!counted_) return;
  {
    std::lock_guard<std::mutex> lock(pace_.mutex_);
    --pace_.active_;
  }
  pace_.turns_.notify_one();
}

void Pace::Turn::done(uint64_t bytes) {
  const std::chrono::nanoseconds took = pace_.now_() - begin_;
  if (!counted_ && (took <= PaceRule::kLong || !pace_.learns_)) return;
  std::lock_guard<std::mutex> lock(pace_.mutex_);
  if (counted_) {
    pace_.rule_.judge(bytes, took, epoch_, full_);
  } else {
    pace_.rule_.slow_down(bytes, took);
  }
  pace_.follow_rule();
}

void Pace::stop() noexcept {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
  }
  turns_.notify_all();
}

// With mutex_ held.
void Pace::follow_rule() {
  if (followed_ == rule_.epoch()) return;
  followed_ = rule_.epoch();
  piece_ = rule_.piece();
  fast_ = rule_.fast();
  turns_.notify_all();
}

}  // namespace weightload
