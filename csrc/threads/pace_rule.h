#pragma once
#include <chrono>
#include <cstdint>
#include <limits>

namespace weightload {

// How large pieces should be and how many threads should read at once, judged by what pieces took: Note [Pieces] in
// threads/pace.h. Without clocks and locks, so that tests say what storage does.
class PaceRule {
 public:
  static constexpr unsigned kAnyNumber = std::numeric_limits<unsigned>::max();

  // What a piece may take.
  static constexpr std::chrono::milliseconds kLong{250};

  PaceRule(unsigned readers, uint64_t most_bytes);

  // Whether there is nothing to hold back: no need to count who reads, nor to judge what takes no longer than kLong.
  bool fast() const { return fast_; }
  uint64_t piece() const { return piece_; }
  unsigned allowed() const { return allowed_; }

  // Of the present pieces and threads. What was begun in another says nothing of them.
  uint64_t epoch() const { return epoch_; }

  // So many bytes took so long. `full`: no other thread might have read besides.
  void judge(uint64_t bytes, std::chrono::nanoseconds took, uint64_t epoch, bool full);

  // A piece of fast storage took long.
  void slow_down(uint64_t bytes, std::chrono::nanoseconds took);

 private:
  enum class Trial : uint8_t { none, smaller, larger, more };

  void finish_trial(std::chrono::nanoseconds took);
  void begin_trial(Trial trial, std::chrono::nanoseconds took);
  void set(uint64_t piece, unsigned allowed);

  const unsigned readers_;
  const uint64_t most_;
  uint64_t piece_;
  unsigned allowed_;
  bool fast_ = false;
  uint64_t epoch_ = 0;
  uint64_t gathered_bytes_ = 0;
  std::chrono::nanoseconds gathered_{0};
  Trial trial_ = Trial::none;
  uint64_t piece_before_ = 0;
  unsigned allowed_before_ = 0;
  std::chrono::nanoseconds took_before_{0};
  uint64_t least_;                                           // smaller pieces take as long
  uint64_t largest_ = std::numeric_limits<uint64_t>::max();  // larger ones cost time in proportion
  unsigned useful_;                                          // more threads do
  unsigned proven_ = 0;                                      // so many read more than half of them would
};

}  // namespace weightload
