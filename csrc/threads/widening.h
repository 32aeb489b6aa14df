#pragma once
#include <chrono>
#include <cstdint>

namespace weightload {

// How many threads a load has: so many at first, and up to `most` where more of them bring more bytes.
struct Threads {
  Threads(unsigned count) : at_first(count), most(count) {}  // NOLINT: a number of threads is one that stays
  Threads(unsigned first, unsigned up_to) : at_first(first < up_to ? first : up_to), most(up_to) {}

  unsigned at_first;
  unsigned most;
};

// `at_first`: 0 for all.
inline Threads threads_of(unsigned most, unsigned at_first) {
  return at_first == 0 ? Threads(most) : Threads(at_first, most);
}

// How many tasks run at once, where more may bring more: requests to a server, each of which waits for a round trip,
// and which the server or the network may hold to a rate of its own.
//
// When as many tasks have ended as ran at once, twice as many run. If all of them together then bring too little more
// than before, it goes back, and stays so. Compared are the rates of tasks, from their begin to their end, not how many
// ended in a time: those that begin together end together. Tasks during which some had nothing to do tell nothing.
class Widening {
 public:
  using Seconds = std::chrono::duration<double>;

  explicit Widening(Threads threads)
      : width_(threads.at_first), most_(threads.most), is_settled_(threads.at_first >= threads.most) {}

  unsigned width() const { return width_; }

  // What a task that begins now has to keep for its end.
  unsigned step() const { return step_; }

  // Fewer run than might.
  void starved() {
    if (!is_settled_) begin_step();
  }

  // A task has ended that began at `step`. True if more may run now.
  bool ended(unsigned step, uint64_t bytes, Seconds took);

 private:
  // Of what as many more tasks could bring at best.
  static constexpr double kWorthIt = 0.25;

  void begin_step();

  unsigned width_;
  const unsigned most_;
  bool is_settled_;
  unsigned step_ = 0;
  unsigned tasks_ = 0;  // that began and ended in this step
  double bytes_ = 0;
  double seconds_ = 0;
  unsigned width_before_ = 0;  // 0: this is the first
  double rate_before_ = 0;     // bytes a second of all together
};

}  // namespace weightload
