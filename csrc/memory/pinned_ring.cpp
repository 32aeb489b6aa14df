#include "memory/pinned_ring.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/byte_range.h"
#include "base/delete_unless_forked.h"
#include "base/error.h"
#include "base/start_thread.h"
#include "base/stopwatch.h"
#include "base/thread_name.h"

namespace weightload {
namespace {

// How long an exhausted ring sleeps before it asks the device again: a few slots' worth of copying at full speed, and
// the ring has more of them than that.
constexpr std::chrono::microseconds kPollInterval{200};

// A slot's copy takes 0.04 ms at PCIe's full speed, and 0.6 ms where 16 devices share that.
constexpr std::chrono::milliseconds kLate{2};

}  // namespace

PinnedRing::PinnedRing(size_t slots, Allocate allocate, size_t enough)
    : allocate_(std::move(allocate)), wanted_(slots), enough_(enough), capacity_(slots) {
  idle_.reserve(slots);
  maker_ = start_thread([this] { make_ahead(); });  // without one acquire() makes the slots
}

std::shared_ptr<PinnedRing> PinnedRing::make(size_t slots, Allocate allocate, size_t enough) {
  return {new PinnedRing(slots, std::move(allocate), enough), DeleteUnlessForked{}};
}

PinnedRing::~PinnedRing() { close(); }

void PinnedRing::close() noexcept {
  stop();
  if (maker_.joinable()) maker_.join();
  // Destroyed without the mutex: it takes calls into the driver.
  std::vector<std::unique_ptr<HostSlot>> idle;
  std::deque<std::unique_ptr<HostSlot>> in_flight;
  std::lock_guard<std::mutex> lock(mutex_);
  idle.swap(idle_);
  in_flight.swap(in_flight_);
}

void PinnedRing::replace(size_t slots, Allocate allocate) {
  std::vector<std::unique_ptr<HostSlot>> others;
  std::unique_lock<std::mutex> lock(mutex_);
  capacity_ = 0;  // the ring's thread makes no more
  changed_.wait(lock, [this] { return making_ == 0; });
  others.swap(idle_);
  slots_ = pageable_ = 0;
  // Destroyed without the mutex, and before others are made: no more is page-locked at any time than may be.
  lock.unlock();
  others.clear();
  lock.lock();
  allocate_ = std::move(allocate);
  wanted_ = capacity_ = enough_ = slots;
  known_ = false;
  aligned_ = pin_ = true;
}

void PinnedRing::make_ahead() {
  name_this_thread();
  std::unique_lock<std::mutex> lock(mutex_);
  // Ahead of the first demand as many as may be; from then on those who need one make it.
  while (!stopped_ && slots_ < std::min(capacity_, enough_) && !(demanded_ && !idle_.empty())) grow(lock);
}

bool PinnedRing::may_grow() const {
  if (slots_ >= capacity_) return false;
  return slots_ < enough_ || (!in_flight_.empty() && std::chrono::steady_clock::now() - progress_ >= kLate);
}

// With mutex_ held and slots_ < capacity_. Returns false when no slot came of it.
bool PinnedRing::grow(std::unique_lock<std::mutex>& lock) {
  ++slots_;
  ++making_;
  const bool pin = pin_;
  lock.unlock();
  std::unique_ptr<HostSlot> slot;
  try {
    slot = allocate_(pin);
  } catch (const std::exception&) {
    // What matters is that there is none; acquire() says so if it comes to that.
  }
  lock.lock();
  --making_;
  if (slot) {
    if (!slot->pinned()) ++pageable_;
    if (!known_) aligned_ = slot->before_aligned() == 0;
    known_ = true;
    idle_.push_back(std::move(slot));
  } else {
    --slots_;
    if (slots_ > 0) {
      capacity_ = slots_;  // smaller, with what there is (or is still being made)
    } else if (pin) {
      pin_ = false;
      capacity_ = wanted_;
    } else {
      capacity_ = 0;
    }
  }
  changed_.notify_all();
  return slots_ > 0;
}

// Whether the first slot in flight can be had. A device that has failed is asked once: those who wait for the thread
// that asks are told.
bool PinnedRing::oldest_is_done() {
  if (failure_) std::rethrow_exception(failure_);
  if (in_flight_.empty()) return false;
  try {
    return in_flight_.front()->copies_done();
  } catch (...) {
    failure_ = std::current_exception();
    changed_.notify_all();
    throw;
  }
}

PinnedRing::Lease PinnedRing::acquire() {
  std::unique_lock<std::mutex> lock(mutex_);
  bool polled = false;
  // Whoever leaves after asking for all lets another take over.
  const auto lease = [&](std::unique_ptr<HostSlot> slot) -> Lease {
    if (polled) changed_.notify_one();
    return {this, std::move(slot)};
  };
  while (true) {
    if (stopped_) throw Error(ErrorKind::usage, "the load was stopped");
    demanded_ = true;
    // Those that have been round before idle ones: the fewer slots are in use, the more of them stay in the caches.
    if (oldest_is_done()) {
      std::unique_ptr<HostSlot> slot = std::move(in_flight_.front());
      in_flight_.pop_front();
      progress_ = std::chrono::steady_clock::now();
      return lease(std::move(slot));
    }
    if (!idle_.empty()) {
      std::unique_ptr<HostSlot> slot = std::move(idle_.back());
      idle_.pop_back();
      return lease(std::move(slot));
    }
    if (may_grow()) {
      if (polled) changed_.notify_one();
      polled = false;
      Stopwatch watch(make_ns_);
      grow(lock);
      continue;
    }
    if (capacity_ == 0) throw Error(ErrorKind::memory, "no memory for reading: neither page-locked nor pageable");
    // A device's events can be asked or waited for; only asking can be interrupted, and waiting may spin inside its
    // driver. One thread asks for all, the others sleep.
    Stopwatch watch(in_flight_.empty() && making_ > 0 ? make_ns_ : wait_ns_);
    if (!in_flight_.empty() && !polling_) {
      polling_ = polled = true;
      changed_.wait_for(lock, kPollInterval);
      polling_ = false;
    } else {
      changed_.wait(lock);
    }
  }
}

void PinnedRing::give_back(std::unique_ptr<HostSlot> slot, bool in_flight) noexcept {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (in_flight) {
      if (in_flight_.empty()) progress_ = std::chrono::steady_clock::now();
      in_flight_.push_back(std::move(slot));
    } else {
      idle_.push_back(std::move(slot));
    }
  }
  changed_.notify_one();
}

size_t PinnedRing::room(size_t slot_bytes) {
  std::unique_lock<std::mutex> lock(mutex_);
  Stopwatch watch(make_ns_);
  while (!known_ && !stopped_ && capacity_ > 0) {
    if (slots_ == 0) {
      grow(lock);
    } else {
      changed_.wait(lock);  // for the one that is being made
    }
  }
  // A slot of one page stays as it is: what is read into it goes through the page cache.
  return aligned_ || slot_bytes <= kDirectAlignment ? slot_bytes : slot_bytes - kDirectAlignment;
}

void PinnedRing::stop() noexcept {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
  }
  changed_.notify_all();
}

PinnedRing::Stats PinnedRing::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return {slots_, pageable_.load(), wait_ns_.load(), make_ns_.load()};
}

}  // namespace weightload
