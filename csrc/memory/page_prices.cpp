#include "memory/page_prices.h"

#include <algorithm>
#include <atomic>

#include "base/pages.h"

namespace weightload {
namespace {

constexpr uint64_t kLeastPriced = 1 << 20;

constexpr double kClearly = 1.5;

constexpr int64_t kMeasured = -1;
std::atomic<int64_t> huge_cost{kMeasured}, single_cost{kMeasured};  // ns, of set_page_costs()

Pages other(Pages pages) { return pages == Pages::huge ? Pages::single : Pages::huge; }

}  // namespace

PagePrices::Cost PagePrices::Price::median() const {
  const size_t count = std::min(recorded, kRemembered);
  auto sorted = latest;
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(count / 2);
  std::nth_element(sorted.begin(), middle, sorted.begin() + static_cast<std::ptrdiff_t>(count));
  return *middle;
}

// A trial has told, or the pages in use have become dear: by so much that it is no accident, as each change of the kind
// in the middle of a block is a mapping more, of which a process has 65,530.
void PagePrices::compare(double margin) {
  if (!huge_.known() || !single_.known()) return;
  const auto huge = huge_.median();
  const auto single = std::chrono::duration<double, std::nano>(single_.median()) * handicap_;
  if (cheaper_ == Pages::huge ? single * margin < huge : huge * margin < single) cheaper_ = other(cheaper_);
}

Pages PagePrices::cheaper() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return cheaper_;
}

void PagePrices::begin_trial(Pages pages) {
  tried_ = pages;
  before_trial_ = cheaper_;
  left_to_try_ = left_to_pay_ = kTrial;
  trial_cost_ = Cost(0);
  waits_ = 0;
}

bool PagePrices::is_trial_due() const {
  if (left_to_try_ > 0 || left_to_pay_ > 0 || until_trial_ > Cost(0)) return false;
  return cheaper_ == Pages::single || huge_.median() >= kSurelyCheap;
}

Pages PagePrices::choose() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (settled_) return cheaper_;
  if (is_trial_due()) begin_trial(other(cheaper_));
  if (left_to_try_ == 0) {
    if (left_to_pay_ > 0 && ++waits_ > kMostWaits) left_to_pay_ = 0;
    return cheaper_;
  }
  --left_to_try_;
  return tried_;
}

void PagePrices::settle(Pages pages) {
  const std::lock_guard<std::mutex> lock(mutex_);
  settled_ = true;
  cheaper_ = pages;
}

Pages PagePrices::choose(uint64_t bytes) { return bytes < kLeastPriced ? cheaper() : choose(); }

void PagePrices::record(Pages pages, Cost cost, uint64_t bytes) {
  if (bytes < kLeastPriced) return;
  const double share = static_cast<double>(kHugePage) / static_cast<double>(bytes);
  record(pages, std::chrono::duration_cast<Cost>(cost * share));
}

void PagePrices::record(Pages pages, Cost cost) {
  const int64_t decided = (pages == Pages::huge ? huge_cost : single_cost).load(std::memory_order_relaxed);
  if (decided != kMeasured) cost = Cost(decided);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (settled_) return;
  Price& price = of(pages);
  price.latest[price.recorded++ % kRemembered] = cost;
  until_trial_ -= cost;
  if (left_to_pay_ > 0 && pages == tried_) {
    trial_cost_ += cost;
    if (--left_to_pay_ > 0) return;
    if (!single_.known()) return;  // the first trial is over, of what is used anyway
    compare(1);
    pause_ = cheaper_ != before_trial_ ? kFirstPause : std::min(2 * pause_, kLongestPause);
    until_trial_ = pause_ * trial_cost_;
    return;
  }
  const Pages before = cheaper_;
  compare(kClearly);
  if (cheaper_ == before) return;
  pause_ = kFirstPause;
  until_trial_ = pause_ * static_cast<int>(kTrial) * of(before).median();
}

void set_page_costs(PagePrices::Cost huge, PagePrices::Cost single) {
  huge_cost = huge.count();
  single_cost = single.count();
}

void measure_page_costs() { huge_cost = single_cost = kMeasured; }

}  // namespace weightload
