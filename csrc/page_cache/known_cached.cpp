#include "page_cache/known_cached.h"

#include <algorithm>

#include "base/coarse_clock.h"
#include "base/pages.h"
#include "page_cache/page_tables.h"
#include "page_cache/residency.h"

namespace weightload {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// Of larger ranges the call is cheap beside what is done with them.
constexpr uint64_t kSmallRange = 1 << 20;

constexpr uint64_t kFirstWidth = 256 << 10;
constexpr uint64_t kMostWidth = 1ull << 40;
constexpr uint64_t kMostMapped = 8 << 20;  // at once, where the kernel does not say what is cached

constexpr microseconds kQuick{200};     // between two questions of a loop
constexpr milliseconds kForgotten{10};  // between two that have nothing to do with each other

}  // namespace

std::optional<bool> KnownCached::ask(const File& file, char* mapping, ByteRange range, bool may_wait) {
  if (!untold_) {
    const auto cached = cached_bytes_by_mincore(file, range, mapping);
    if (cached) return *cached == range.size();
    untold_ = true;
    return contains(file, mapping, range, may_wait);
  }
  if (!seems_cached(file, range, mapping).value_or(false)) return false;
  const ByteRange pages = pages_around(range);
  bool was_read = false;
  return PageTables().map_unknown(mapping + pages.begin, mapping + pages.end, was_read) == 0;
}

// Asked for each small tensor: with the cheap clock.
bool KnownCached::remembers(ByteRange range) const {
  return known_.begin <= range.begin && range.end <= known_.end && coarse_now() < known_until_;
}

std::optional<bool> KnownCached::contains(const File& file, char* mapping, ByteRange range, bool may_wait) {
  if (!may_wait && untold_) return std::nullopt;
  if (range.size() > kSmallRange) return ask_and_remember(file, mapping, range, may_wait);
  const auto now = Clock::now();
  const auto since = now - asked_;
  asked_ = now;
  if (since > kForgotten) {
    width_ = untold_ ? kFirstWidth : 0;  // then asking takes several calls, for however little
  } else if (since < kQuick && width_ < kMostWidth) {
    width_ = std::max(kFirstWidth, (untold_ ? 16 : 4) * width_);
    if (untold_) width_ = std::min(width_, kMostMapped);
  }
  if (width_ > 0 && now >= mixed_until_) {
    const ByteRange around{round_down(range.begin, width_), std::min(file.size(), round_up(range.end, width_))};
    const std::optional<bool> cached = ask_and_remember(file, mapping, around, may_wait);
    if (cached != false) return cached;
  }
  return ask(file, mapping, range, may_wait);
}

std::optional<bool> KnownCached::ask_and_remember(const File& file, char* mapping, ByteRange range, bool may_wait) {
  const auto asked = Clock::now();
  const std::optional<bool> cached = ask(file, mapping, range, may_wait);
  if (!cached) return cached;
  const auto answered = Clock::now();
  // What had to be mapped for an answer is worth more than one.
  const Clock::duration valid = untold_ ? kForgotten : std::min<Clock::duration>(kForgotten, 30 * (answered - asked));
  if (*cached) {
    known_ = range;
    known_until_ = answered + valid;
  } else {
    mixed_until_ = answered + valid;
  }
  return cached;
}

}  // namespace weightload
