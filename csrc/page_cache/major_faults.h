#pragma once
#include <sys/resource.h>

#include <optional>

namespace weightload {

// Counts the pages that this thread has waited for since (major faults): none, if all it asked for were there. A system
// call populates on behalf of its thread, and its faults are counted like any.
class MajorFaults {
 public:
  bool are_counted() const { return before_.has_value(); }

  // Whether there were any, or might have been where the count is refused.
  bool any() const { return !before_ || count() != before_; }

 private:
  static std::optional<long> count() {
    struct rusage usage;
    if (::getrusage(RUSAGE_THREAD, &usage) != 0) return std::nullopt;
    return usage.ru_majflt;
  }

  const std::optional<long> before_ = count();
};

}  // namespace weightload
