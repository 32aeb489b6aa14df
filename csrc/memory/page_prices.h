#pragma once
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace weightload {

// What a process's memory is made of.
enum class Pages : uint8_t {
  huge,    // one page fault for 2 MiB, where the system has such pages
  single,  // as small as they come
};

// Which pages fresh memory is cheaper in, a process's own or the page cache's, by what this load has paid for either.
// Many threads.
//
// Note [Prices of pages]
// On most machines a huge page costs a fraction of the 512 single ones. On a virtual machine that reports its free
// memory to its host it may cost ten times as much as those: free blocks of 2 MiB and more have been taken away, and
// are brought back while the process waits; what is free in smaller pieces is still there. Which of the two it is
// depends on the machine, on whether somebody has just freed memory, and changes in the middle of a load: only trying
// tells. So a load that finds huge pages dear pays for a few of the others, goes on with the cheaper ones, and tries
// the dearer again now and then. A trial is of several pages after each other, as all threads then make such ones:
// while one waits for its host the others do, too. Prices are medians, as one page may be cheap by chance, and one
// measurement wait for a processor.
class PagePrices {
 public:
  using Cost = std::chrono::nanoseconds;

  // Single pages count as so many times what they cost.
  explicit PagePrices(double handicap) : handicap_(handicap) {}

  // What the next huge page's worth of memory, or so many bytes, are to be made of.
  Pages choose();
  Pages choose(uint64_t bytes);

  // From now on these, whatever they cost.
  void settle(Pages pages);

  // What a huge page's worth has cost, or so many bytes; of a few bytes the price says nothing.
  void record(Pages pages, Cost cost);
  void record(Pages pages, Cost cost, uint64_t bytes);

  // The cheaper ones so far.
  Pages cheaper() const;

 private:
  static constexpr size_t kRemembered = 5;

  // Pages that are tried at a time. Most of those that are remembered: the others may be of another time.
  static constexpr size_t kTrial = 4;

  // Between two trials a load spends so many times what the last one has cost, twice as many after each that has
  // changed nothing: first a tenth of the time goes into trials, later one percent.
  static constexpr int kFirstPause = 10;
  static constexpr int kLongestPause = 80;

  // After so many other choices a trial is over, paid or not: who was to pay may have met an error.
  static constexpr size_t kMostWaits = 64;

  // Huge pages that cost less (4 GB/s) are taken without a trial of the others: on most machines no load ever makes
  // one.
  static constexpr Cost kSurelyCheap = std::chrono::microseconds(500);

  struct Price {
    std::array<Cost, kRemembered> latest{};
    size_t recorded = 0;
    bool known() const { return recorded > 0; }
    Cost median() const;
  };

  bool is_trial_due() const;
  void compare(double margin);
  Price& of(Pages pages) { return pages == Pages::huge ? huge_ : single_; }
  void begin_trial(Pages pages);

  const double handicap_;
  mutable std::mutex mutex_;  // guards all below
  bool settled_ = false;
  Price huge_, single_;
  Pages cheaper_ = Pages::huge;
  Pages tried_ = Pages::huge;  // in the trial that is under way, if one is
  Pages before_trial_ = Pages::huge;
  size_t left_to_try_ = kTrial;
  size_t left_to_pay_ = kTrial;
  size_t waits_ = 0;  // choices since the last of the trial was begun
  Cost trial_cost_{0};
  Cost until_trial_{0};
  int pause_ = kFirstPause;
};

// For tests: from now on huge and single pages have cost so much, whatever they did cost.
void set_page_costs(PagePrices::Cost huge, PagePrices::Cost single);
void measure_page_costs();

}  // namespace weightload
