#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace simulated {

// What a stream, an event or the host knows to be done: of each stream, up to which of its operations.
class Clock {
 public:
  uint64_t of(size_t stream) const { return stream < seen_.size() ? seen_[stream] : 0; }

  void join(const Clock& other) {
    if (seen_.size() < other.seen_.size()) seen_.resize(other.seen_.size());
    for (size_t i = 0; i < other.seen_.size(); ++i) seen_[i] = std::max(seen_[i], other.seen_[i]);
  }

  // The number of the stream's next operation.
  uint64_t tick(size_t stream) {
    if (stream >= seen_.size()) seen_.resize(stream + 1);
    return ++seen_[stream];
  }

 private:
  std::vector<uint64_t> seen_;
};

}  // namespace simulated
