#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "memory/host_slot.h"

namespace weightload {

// A bounded number of slots that travel between reading threads and the device: idle -> leased (being filled) -> in
// flight (being copied from) -> idle. acquire() is the back-pressure: it waits while all slots are leased or in flight.
//
// The fewer slots are in use, the more of what threads write is still in the processor's caches when the device fetches
// it. So beyond `enough` of them more are made only while the device is late: once it has given none back for kLate,
// as when it has other work before the copies. (16 cores and an H100: 40 GB/s through 256 MiB, 45 to 49 through 64.)
//
// Page-locking is slow (about 4 GB/s the first time), so slots are made one by one: by a thread of the ring, from
// construction to the first demand, and by whoever finds none. When page-locking fails the ring stays as small as it
// is; with no slot at all it takes pageable memory, and says so in stats().
class PinnedRing {
 public:
  // Makes a slot; null or a std::exception when there is no memory of that kind. Called from several threads.
  using Allocate = std::function<std::unique_ptr<HostSlot>(bool pinned)>;

  // Shared, so that a child forked meanwhile leaves it alone: see DeleteUnlessForked.
  static std::shared_ptr<PinnedRing> make(size_t slots, Allocate allocate, size_t enough = SIZE_MAX);
  ~PinnedRing();  // closes

  PinnedRing(const PinnedRing&) = delete;
  PinnedRing& operator=(const PinnedRing&) = delete;

  // Before the first acquire(): other slots, in place of those that were made until then.
  void replace(size_t slots, Allocate allocate);

  // A slot of one's own. Goes back as idle on destruction, or as in flight with release_to_device().
  class Lease {
   public:
    Lease(PinnedRing* ring, std::unique_ptr<HostSlot> slot) : ring_(ring), slot_(std::move(slot)) {}
    Lease(Lease&& other) noexcept = default;
    Lease& operator=(Lease&&) = delete;
    ~Lease() {
      if (slot_) ring_->give_back(std::move(slot_), false);
    }
    HostSlot& operator*() const { return *slot_; }
    HostSlot* operator->() const { return slot_.get(); }

    // The device copies from it: it is idle again when HostSlot::copies_done(). Mark the slot first.
    void release_to_device() { ring_->give_back(std::move(slot_), true); }

   private:
    PinnedRing* ring_;
    std::unique_ptr<HostSlot> slot_;
  };

  // Waits for a slot. Throws Error{memory} when not one can be had, Error{usage} once stopped, and what the device says
  // once it has failed: in all threads, whichever of them asked it.
  Lease acquire();

  // What is to be put into the slots of so many bytes, so that it can lie where direct reads may write (HostSlot::
  // place_for): all, or kDirectAlignment less where the allocator does not align. Waits for the first slot, which
  // tells; the slots stay as they are, so that not a byte more is page-locked.
  size_t room(size_t slot_bytes);

  // Makes acquire() throw, in all threads. Does not wait.
  void stop() noexcept;

  // Stops, joins the ring's thread and gives the slots back, also those in flight: their memory must outlive the copies
  // by itself (HostSlot's destructor sees to it). No lease may be left.
  void close() noexcept;

  struct Stats {
    size_t slots = 0;           // made so far
    size_t pageable_slots = 0;  // of these, not page-locked
    uint64_t wait_ns = 0;       // of all reading threads together, for the device to give a slot back
    uint64_t make_ns = 0;       // the same for slots to be made, and making them; and of those who ask for room()
  };
  Stats stats() const;

  // Whether slots are pageable. No lock.
  bool pageable() const { return pageable_.load(std::memory_order_relaxed) > 0; }

 private:
  PinnedRing(size_t slots, Allocate allocate, size_t enough);
  bool may_grow() const;                          // with mutex_ held
  bool oldest_is_done();                          // with mutex_ held
  bool grow(std::unique_lock<std::mutex>& lock);  // makes one slot idle; unlocks meanwhile
  void give_back(std::unique_ptr<HostSlot> slot, bool in_flight) noexcept;
  void make_ahead();

  mutable std::mutex mutex_;
  Allocate allocate_;  // called without the mutex: replaced only while nobody makes a slot
  size_t wanted_;
  size_t enough_;
  size_t making_ = 0;                // threads that make a slot
  std::condition_variable changed_;  // a slot came back, or stop
  size_t capacity_;                  // shrinks when page-locking fails
  size_t slots_ = 0;                 // made or being made
  std::atomic<size_t> pageable_{0};
  bool known_ = false;     // a slot has been made
  bool aligned_ = true;    // the first one began where direct reads may write
  bool pin_ = true;        // false once page-locking has failed without a single slot
  bool demanded_ = false;  // acquire() was called
  bool stopped_ = false;
  std::exception_ptr failure_;                       // of the device
  bool polling_ = false;                             // a thread asks the device on behalf of all
  std::chrono::steady_clock::time_point progress_;   // the device gave a slot back, or got the first
  std::vector<std::unique_ptr<HostSlot>> idle_;      // the last used is the first reused: its lines may be cached
  std::deque<std::unique_ptr<HostSlot>> in_flight_;  // in the order of their copies
  std::atomic<uint64_t> wait_ns_{0}, make_ns_{0};
  std::thread maker_;  // last: it uses everything above
};

}  // namespace weightload
