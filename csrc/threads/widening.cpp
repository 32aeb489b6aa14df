#include "threads/widening.h"

#include <algorithm>
#include <utility>

namespace weightload {

void Widening::begin_step() {
  ++step_;
  tasks_ = 0;
  bytes_ = seconds_ = 0;
}

bool Widening::ended(unsigned step, uint64_t bytes, Seconds took) {
  if (is_settled_ || step != step_) return false;
  ++tasks_;
  bytes_ += static_cast<double>(bytes);
  seconds_ += took.count();
  if (tasks_ < width_ || seconds_ <= 0) return false;
  const double rate = width_ * bytes_ / seconds_;
  if (width_before_ > 0) {
    const double more = static_cast<double>(width_) / width_before_ - 1;
    if (rate < rate_before_ * (1 + kWorthIt * more)) {
      is_settled_ = true;
      width_ = width_before_;
      return false;
    }
  }
  if (width_ == most_) {
    is_settled_ = true;
    return false;
  }
  rate_before_ = rate;
  width_before_ = std::exchange(width_, std::min(most_, 2 * width_));
  begin_step();
  return true;
}

}  // namespace weightload
