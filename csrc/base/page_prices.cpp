#include "base/page_prices.h"

#include <algorithm>
#include <atomic>

namespace weightload {
namespace {

constexpr uint64_t kHugePageBytes = 2 << 20;
constexpr uint64_t kLeastPriced = 1 << 20;

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

Pages PagePrices::cheaper_of_known() const {
  if (!huge_.known() || !single_.known()) return Pages::huge;
  return single_.median() * handicap_ < huge_.median() ? Pages::single : Pages::huge;
}

Pages PagePrices::cheaper() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return cheaper_of_known();
}

void PagePrices::begin_trial(Pages pages) {
  tried_ = pages;
  before_trial_ = cheaper_of_known();
  left_to_try_ = left_to_pay_ = kTrial;
  trial_cost_ = Cost(0);
  waits_ = 0;
}

bool PagePrices::is_trial_due() const {
  if (left_to_try_ > 0 || left_to_pay_ > 0 || until_trial_ > Cost(0)) return false;
  return cheaper_of_known() == Pages::single || huge_.median() >= kSurelyCheap;
}

Pages PagePrices::choose() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (is_trial_due()) begin_trial(other(cheaper_of_known()));
  if (left_to_try_ == 0) {
    if (left_to_pay_ > 0 && ++waits_ > kMostWaits) left_to_pay_ = 0;
    return cheaper_of_known();
  }
  --left_to_try_;
  return tried_;
}

Pages PagePrices::choose(uint64_t bytes) { return bytes < kLeastPriced ? cheaper() : choose(); }

void PagePrices::record(Pages pages, Cost cost, uint64_t bytes) {
  if (bytes < kLeastPriced) return;
  const double share = static_cast<double>(kHugePageBytes) / static_cast<double>(bytes);
  record(pages, std::chrono::duration_cast<Cost>(cost * share));
}

void PagePrices::record(Pages pages, Cost cost) {
  const int64_t decided = (pages == Pages::huge ? huge_cost : single_cost).load(std::memory_order_relaxed);
  if (decided != kMeasured) cost = Cost(decided);
  const std::lock_guard<std::mutex> lock(mutex_);
  const Pages before = cheaper_of_known();
  Price& price = of(pages);
  price.latest[price.recorded++ % kRemembered] = cost;
  until_trial_ -= cost;
  if (left_to_pay_ > 0 && pages == tried_) {
    trial_cost_ += cost;
    if (--left_to_pay_ > 0) return;
    if (!single_.known()) return;  // the first trial is over, of what is used anyway
    pause_ = cheaper_of_known() != before_trial_ ? kFirstPause : std::min(2 * pause_, kLongestPause);
    until_trial_ = pause_ * trial_cost_;
  } else if (cheaper_of_known() != before) {  // what was the cheaper kind has become dear
    pause_ = kFirstPause;
    until_trial_ = pause_ * static_cast<int>(kTrial) * of(before).median();
  }
}

void set_page_costs(PagePrices::Cost huge, PagePrices::Cost single) {
  huge_cost = huge.count();
  single_cost = single.count();
}

void measure_page_costs() { huge_cost = single_cost = kMeasured; }

}  // namespace weightload
