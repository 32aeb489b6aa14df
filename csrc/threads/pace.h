#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <mutex>
#include <type_traits>

#include "base/byte_range.h"
#include "base/look.h"
#include "base/pages.h"
#include "threads/pace_rule.h"

namespace weightload {

// How large the pieces are that files are read in, and how many threads read at once, so that whoever wants the reading
// to end need not wait long: a system call that waits for storage cannot be broken off.
//
// Note [Pieces]
// A piece should take no longer than a quarter of a second. The first is small, and read by one thread. Healthy storage
// answers within milliseconds: after four pieces all threads read, each what it has to in one call. On
// storage that is slower the pieces grow while they stay below the quarter second, or while larger ones cost no more
// (where it is the answer that takes long, not the bytes), and threads are added while a piece takes no longer for it.
// A piece that does take longer makes the next ones smaller, unless smaller ones have turned out to take as long.
class Pace {
 public:
  using Clock = std::chrono::steady_clock;
  using Now = Clock::time_point (*)();

  // Pieces from which on the system may well read more than it is asked for: the next reads then find it there. Where
  // smaller ones take long it would only be in their way.
  static constexpr uint64_t kReadOn = 1 << 20;

  static constexpr unsigned kAnyNumber = PaceRule::kAnyNumber;

  // Threads that may read at once, if it is of use; kAnyNumber does not hold any back. No piece exceeds `most_bytes`.
  // `now` is the clock.
  explicit Pace(unsigned readers = kAnyNumber, uint64_t most_bytes = std::numeric_limits<uint64_t>::max(),
                Now now = &Clock::now);

  // Holds nothing back, whatever it takes: for reads that can be broken off.
  struct Unpaced {};
  explicit Pace(Unpaced);

  // Calls read(piece) for one piece of the range after the other, which comes from storage, and look() before each. If
  // read() returns a bool, false ends it: what was refused says nothing of the storage.
  template <typename Read>
  void in_pieces(ByteRange range, const Look& look, Read&& read) {
    for (uint64_t at = range.begin; at < range.end;) {
      Turn turn(*this);
      look();
      const ByteRange piece{at, end_of_piece(at, range.end, turn.most())};
      if constexpr (std::is_same_v<std::invoke_result_t<Read&, ByteRange>, bool>) {
        if (!read(piece)) return;
      } else {
        read(piece);
      }
      turn.done(piece.size());
      at = piece.end;
    }
  }

  // The same for bytes that should be in the page cache, and as above from where they turn out not to be.
  template <typename Read>
  void in_cached_pieces(ByteRange range, const Look& look, Read&& read) {
    for (uint64_t at = range.begin; at < range.end;) {
      look();
      const ByteRange piece{at, end_of_piece(at, range.end, fast_.load(std::memory_order_relaxed) ? most_ : kCached)};
      const auto begin = now_();
      read(piece);
      at = piece.end;
      if (now_() - begin <= PaceRule::kLong) continue;
      in_pieces({at, range.end}, look, read);
      return;
    }
  }

  // Whether so many bytes may be asked for in one call.
  bool allows(uint64_t bytes) const { return piece_.load(std::memory_order_relaxed) >= bytes; }

  // Who waits for a turn gets it: to look, and find that all is over.
  void stop() noexcept;

 private:
  static constexpr uint64_t kCached = 1 << 20;

  class Turn {
   public:
    explicit Turn(Pace& pace);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    uint64_t most() const { return most_; }
    void done(uint64_t bytes);

   private:
    Pace& pace_;
    uint64_t most_ = 0;
    uint64_t epoch_ = 0;
    bool counted_ = false;  // among those that read
    bool full_ = false;     // no other might read besides
    Clock::time_point begin_;
  };

  // At a page, so that none is read twice.
  static uint64_t end_of_piece(uint64_t begin, uint64_t end, uint64_t most) {
    if (end - begin <= most) return end;
    const uint64_t cut = round_down(begin + most, page_bytes());
    return cut > begin ? cut : begin + most;
  }

  void follow_rule();

  const uint64_t most_;
  const Now now_;
  const bool learns_ = true;

  std::mutex mutex_;  // guards all below; the atomics are read without it
  std::condition_variable turns_;
  PaceRule rule_;
  std::atomic<uint64_t> piece_;
  std::atomic<bool> fast_{false};  // nobody waits, and nobody is counted
  uint64_t followed_ = 0;          // the rule's epoch that piece_ and fast_ are from
  bool stopped_ = false;
  unsigned active_ = 0;
};

}  // namespace weightload
