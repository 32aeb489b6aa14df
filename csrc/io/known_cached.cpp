#include "io/known_cached.h"

#include <algorithm>

#include "io/residency.h"

namespace weightload {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// Of larger ranges the call is cheap beside what is done with them.
constexpr uint64_t kSmall = 1 << 20;

constexpr uint64_t kFirstWidth = 256 << 10;
constexpr uint64_t kMostWidth = 1ull << 40;

constexpr microseconds kQuick{200};     // between two questions of a loop
constexpr milliseconds kForgotten{10};  // between two that have nothing to do with each other

}  // namespace

bool KnownCached::ask(const File& file, char* mapping, ByteRange range) {
  if (untold_) return false;
  const auto cached = cached_bytes_by_mincore(file, range, mapping);
  untold_ = !cached;
  return cached == range.size();
}

bool KnownCached::contains(const File& file, char* mapping, ByteRange range) {
  const auto now = Clock::now();
  if (known_.begin <= range.begin && range.end <= known_.end && now < known_until_) return true;
  if (range.size() > kSmall) return ask(file, mapping, range);
  const auto since = now - asked_;
  asked_ = now;
  if (since > kForgotten) {
    width_ = 0;
  } else if (since < kQuick && width_ < kMostWidth) {
    width_ = std::max(kFirstWidth, 4 * width_);
  }
  if (width_ > 0 && now >= mixed_until_ && ask_around(file, mapping, range, now)) return true;
  return ask(file, mapping, range);
}

bool KnownCached::ask_around(const File& file, char* mapping, ByteRange range, Clock::time_point now) {
  const ByteRange around{round_down(range.begin, width_), std::min(file.size(), round_up(range.end, width_))};
  const bool cached = ask(file, mapping, around);
  const auto answered = Clock::now();
  const auto valid = answered + std::min<Clock::duration>(kForgotten, 30 * (answered - now));
  if (cached) {
    known_ = around;
    known_until_ = valid;
  } else {
    mixed_until_ = valid;
  }
  return cached;
}

}  // namespace weightload
