#include "threads/pace_rule.h"

#include <algorithm>

namespace weightload {
namespace {

using std::chrono::milliseconds;
using std::chrono::nanoseconds;

constexpr uint64_t kFirstPiece = 64 << 10;
constexpr uint64_t kLeast = 16 << 10;
constexpr uint64_t kUnit = 16 << 10;    // pieces are multiples of it
constexpr uint64_t kMost = 1ull << 40;  // more than any read

// Pieces from which on there is nothing to hold back: a task.
constexpr uint64_t kFast = 8 << 20;

// A piece that took no longer says that all threads may read.
constexpr milliseconds kShort{30};

// What one answer may multiply the size by.
constexpr int64_t kMostGrowth = 4;

// Below, a piece that took long has slow storage behind it, not many readers' share of a disk.
constexpr uint64_t kSmallPiece = 1 << 20;

// So much within kShort is not the answer of what happened to be at hand.
constexpr uint64_t kConvincing = 4 << 20;

// Trials: smaller pieces must take less than that part of the time, twice as large ones no more, as much again for
// twice as many threads.
constexpr double kSmallerGain = 0.75, kLargerCost = 1.5, kMoreCost = 1.4;

uint64_t in_units(uint64_t bytes) { return std::max(kLeast, bytes / kUnit * kUnit); }

}  // namespace

PaceRule::PaceRule(unsigned readers, uint64_t most_bytes)
    : readers_(std::max(readers, 1u)),
      most_(most_bytes),
      piece_(std::min(kFirstPiece, most_bytes)),
      allowed_(readers == kAnyNumber ? readers : 1),
      least_(kLeast),
      useful_(readers_) {}

void PaceRule::set(uint64_t piece, unsigned allowed) {
  piece_ = std::min({piece, most_, kMost});
  allowed_ = std::min(allowed, readers_);
  fast_ = piece_ >= std::min(kFast, most_) && allowed_ == readers_;
  ++epoch_;
  gathered_bytes_ = 0;
  gathered_ = {};
}

void PaceRule::slow_down(uint64_t bytes, nanoseconds took) {
  if (!fast_) return;  // another has said so
  trial_ = Trial::none;
  const uint64_t piece = in_units(static_cast<uint64_t>(static_cast<double>(bytes) * (kLong / 2) / took));
  const bool hold_back = piece < kSmallPiece && readers_ != kAnyNumber;
  set(std::min(piece, kFast / 2), hold_back ? 1 : allowed_);
}

void PaceRule::judge(uint64_t bytes, nanoseconds took, uint64_t epoch, bool full) {
  if (epoch != epoch_) return;
  const uint64_t piece = piece_;
  // Small ones say something together.
  gathered_bytes_ += bytes;
  gathered_ += took;
  if (took <= kLong && gathered_bytes_ < piece && gathered_ <= kLong) return;
  took = gathered_;
  gathered_bytes_ = 0;
  gathered_ = {};

  const int64_t growth = std::min<int64_t>(kMostGrowth, took.count() == 0 ? kMostGrowth : nanoseconds(kLong) / took);
  const bool convincing = took <= kShort && piece >= std::min(kConvincing, most_);
  if (trial_ != Trial::more && (convincing || (growth >= 2 && piece < std::min(kFast, most_)))) {
    trial_ = Trial::none;
    if (convincing) {
      least_ = kLeast;
      largest_ = std::numeric_limits<uint64_t>::max();
      useful_ = readers_;
    }
    set(piece * static_cast<uint64_t>(growth), convincing ? readers_ : allowed_);
    return;
  }
  if (trial_ != Trial::none) {
    if (trial_ != Trial::more || full) finish_trial(took);
    return;
  }
  if (took > kLong && piece <= kSmallPiece && allowed_ > std::max(proven_, 1u) && readers_ != kAnyNumber) {
    set(in_units(piece / 4), std::max(proven_, 1u));
  } else if (took > kLong && piece > least_) {
    begin_trial(Trial::smaller, took);
  } else if ((took <= kLong || piece <= least_) && piece > kLeast && piece < std::min(largest_, most_)) {
    begin_trial(Trial::larger, took);
  } else if (allowed_ < useful_) {
    begin_trial(Trial::more, took);
  }
}

void PaceRule::begin_trial(Trial trial, nanoseconds took) {
  trial_ = trial;
  piece_before_ = piece_;
  allowed_before_ = allowed_;
  took_before_ = took;
  const uint64_t piece = piece_;
  switch (trial) {
    case Trial::smaller:
      set(std::max(least_, std::min(in_units(piece / 2),
                                    in_units(static_cast<uint64_t>(static_cast<double>(piece) * (kLong / 2) / took)))),
          allowed_);
      break;
    case Trial::larger: set(piece * 2, allowed_); break;
    case Trial::more: set(piece, std::min(useful_, allowed_ * 2)); break;
    case Trial::none: break;
  }
}

void PaceRule::finish_trial(nanoseconds took) {
  const double times = std::chrono::duration<double>(took) / took_before_;
  const Trial trial = trial_;
  trial_ = Trial::none;
  switch (trial) {
    case Trial::smaller:
      if (times <= kSmallerGain) return;
      least_ = piece_before_;
      break;
    case Trial::larger:
      if (times <= kLargerCost) {
        if (took > kLong) least_ = piece_;  // it is the answer that takes long
        return;
      }
      largest_ = piece_before_;
      break;
    case Trial::more:
      if (times <= kMoreCost) {
        proven_ = allowed_;
        return;
      }
      useful_ = allowed_before_;
      break;
    case Trial::none: return;
  }
  set(piece_before_, allowed_before_);
}

}  // namespace weightload
