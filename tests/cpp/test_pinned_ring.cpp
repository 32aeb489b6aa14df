#include "memory/pinned_ring.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <stdexcept>

#include "base/error.h"
#include "check.h"
#include "fake_device.h"

using namespace weightload;

namespace {

PinnedRing::Allocate from(FakeDevice& device) {
  return [&device](bool pinned) { return device.allocate_slot(4096, pinned); };
}

}  // namespace

TEST(slots_are_made_ahead_and_no_more_than_asked_for) {
  FakeDevice device;
  {
    const auto ring = PinnedRing::make(3, from(device));
    std::vector<PinnedRing::Lease> leases;
    for (int i = 0; i < 3; ++i) leases.push_back(ring->acquire());
    CHECK(device.slots_alive == 3);
    CHECK(ring->stats().slots == 3);
  }
  CHECK(device.slots_alive == 0);
}

TEST(an_exhausted_ring_waits_for_a_lease_to_come_back) {
  FakeDevice device;
  const auto ring = PinnedRing::make(1, from(device));
  auto lease = std::make_unique<PinnedRing::Lease>(ring->acquire());
  std::atomic<bool> got{false};
  std::thread other([&] {
    PinnedRing::Lease second = ring->acquire();
    got = true;
  });
  CHECK(!got);
  lease.reset();
  other.join();
  CHECK(got);
}

TEST(a_slot_in_flight_comes_back_when_its_copies_are_done) {
  FakeDevice device;
  const auto ring = PinnedRing::make(2, from(device));
  FakeDevice::Block block(4096);
  for (int i = 0; i < 500; ++i) {
    PinnedRing::Lease lease = ring->acquire();
    std::memset(lease->data(), i, 4096);
    device.copy(*lease, 0, block, 0, 4096);
    device.mark_slot(*lease);
    lease.release_to_device();
  }
  device.await_all();
  CHECK(block.bytes[0] == static_cast<char>(499) && block.bytes[4095] == static_cast<char>(499));
}

TEST(no_more_than_enough_slots_while_the_device_keeps_up) {
  FakeDevice device;
  const auto ring = PinnedRing::make(100, from(device), 2);
  FakeDevice::Block block(4096);
  for (int i = 0; i < 500; ++i) {
    PinnedRing::Lease lease = ring->acquire();
    device.copy(*lease, 0, block, 0, 4096);
    device.mark_slot(*lease);
    lease.release_to_device();
    device.await_all();
  }
  CHECK(ring->stats().slots == 2);
}

TEST(slots_that_threads_hold_are_waited_for_beyond_enough) {
  FakeDevice device;
  const auto ring = PinnedRing::make(100, from(device), 1);
  auto lease = std::make_unique<PinnedRing::Lease>(ring->acquire());
  std::thread other([&] { static_cast<void>(ring->acquire()); });
  lease.reset();
  other.join();
  CHECK(ring->stats().slots == 1);
}

TEST(a_device_that_is_late_gets_all_slots) {
  FakeDevice device;
  {
    const auto ring = PinnedRing::make(10, from(device), 2);
    FakeDevice::Block block(4096);
    const auto go_on = device.hold();
    for (int i = 0; i < 10; ++i) {
      PinnedRing::Lease lease = ring->acquire();
      device.copy(*lease, 0, block, 0, 4096);
      device.mark_slot(*lease);
      lease.release_to_device();
    }
    CHECK(ring->stats().slots == 10);
    go_on();
    static_cast<void>(ring->acquire());
    CHECK(ring->stats().slots == 10);
    device.await_all();
  }
  CHECK(device.slots_alive == 0);
}

TEST(slots_are_replaced_before_the_first_is_asked_for) {
  for (int round = 0; round < 200; ++round) {
    FakeDevice device;
    {
      const auto ring = PinnedRing::make(8, from(device), 4);
      if (round % 2) CHECK(ring->room(4096) == 4096);
      std::atomic<int> most{0};
      ring->replace(3, [&](bool pinned) {
        most = std::max<int>(most, device.slots_alive);
        return device.allocate_slot(8192, pinned);
      });
      CHECK(ring->room(8192) == 8192);
      std::vector<PinnedRing::Lease> leases;
      for (int i = 0; i < 3; ++i) leases.push_back(ring->acquire());
      for (const auto& lease : leases) CHECK(lease->size() == 8192);
      CHECK(ring->stats().slots == 3);
      CHECK(device.slots_alive == 3);
      CHECK(most <= 2);  // those before are gone before others are made
    }
    CHECK(device.slots_alive == 0);
  }
}

TEST(slots_in_place_of_those_that_could_not_be_locked_are_tried_anew) {
  FakeDevice device;
  device.pinned_left = 0;
  const auto ring = PinnedRing::make(8, from(device), 4);
  CHECK(ring->room(4096) == 4096);
  device.pinned_left = 2;
  ring->replace(3, from(device));
  const PinnedRing::Lease lease = ring->acquire();
  CHECK(lease->pinned());
  CHECK(ring->stats().pageable_slots == 0);
}

TEST(when_page_locking_fails_the_ring_stays_small) {
  FakeDevice device;
  device.pinned_left = 2;
  const auto ring = PinnedRing::make(10, from(device));
  PinnedRing::Lease first = ring->acquire();
  PinnedRing::Lease second = ring->acquire();
  CHECK(first->pinned() && second->pinned());
  CHECK(ring->stats().slots == 2 && ring->stats().pageable_slots == 0);
}

TEST(without_any_page_locked_memory_it_is_pageable) {
  FakeDevice device;
  device.pinned_left = 0;
  const auto ring = PinnedRing::make(4, from(device));
  std::vector<PinnedRing::Lease> leases;
  for (int i = 0; i < 4; ++i) leases.push_back(ring->acquire());
  CHECK(!leases[0]->pinned());
  CHECK(ring->stats().pageable_slots == 4);
}

TEST(without_any_memory_it_is_an_error) {
  FakeDevice device;
  device.pinned_left = 0;
  device.no_pageable = true;
  const auto ring = PinnedRing::make(4, from(device));
  CHECK_THROWS(ring->acquire(), Error, error.kind == ErrorKind::memory);
}

TEST(room_is_what_direct_reads_can_have) {
  struct Case {
    size_t shift, slot_bytes, room, place;
  };
  for (const Case& one : {Case{0, 16384, 16384, 0},
                          {16, 16384, 12288, 4080},
                          {4095, 16384, 12288, 1},
                          {16, 8192, 4096, 4080},
                          {16, 4096, 4096, 0},
                          {0, 4096, 4096, 0}}) {
    FakeDevice device;
    device.shift = one.shift;
    const auto ring = PinnedRing::make(3, [&](bool pinned) { return device.allocate_slot(one.slot_bytes, pinned); });
    CHECK(ring->room(one.slot_bytes) == one.room);
    const PinnedRing::Lease lease = ring->acquire();
    CHECK(lease->place_for(one.room) == one.place);
    CHECK(lease->size() == one.slot_bytes);
  }
}

TEST(room_is_asked_of_the_first_slot_and_later_ones_may_be_less_lucky) {
  FakeDevice device;
  std::promise<void> asked;
  std::atomic<int> made{0};
  const auto ring = PinnedRing::make(2, [&, after = asked.get_future().share()](bool pinned) {
    if (made++ > 0) {
      after.wait();  // threads make slots side by side, and the second may be done before the first
      device.shift = 16;
    }
    return device.allocate_slot(8192, pinned);
  });
  CHECK(ring->room(8192) == 8192);
  asked.set_value();
  const PinnedRing::Lease one = ring->acquire(), other = ring->acquire();
  CHECK(one->place_for(8192) == 0 && other->place_for(8192) == 0);
  CHECK(one->before_aligned() + other->before_aligned() == 4080);
}

TEST(room_does_not_wait_for_slots_that_never_come) {
  FakeDevice device;
  device.no_pageable = true;
  device.pinned_left = 0;
  CHECK(PinnedRing::make(3, from(device))->room(8192) == 8192);
  device.pinned_left = 1;
  const auto stopped = PinnedRing::make(3, from(device));
  stopped->stop();
  CHECK(stopped->room(8192) == 8192);
}

TEST(allocators_may_throw) {
  FakeDevice device;
  const auto ring = PinnedRing::make(4, [&](bool pinned) -> std::unique_ptr<HostSlot> {
    if (pinned) throw std::runtime_error("cannot lock");
    return device.allocate_slot(4096, false);
  });
  CHECK(!ring->acquire()->pinned());
}

TEST(stop_wakes_those_who_wait) {
  FakeDevice device;
  const auto ring = PinnedRing::make(1, from(device));
  PinnedRing::Lease lease = ring->acquire();
  std::vector<std::thread> waiting;
  std::atomic<int> woken{0};
  for (int i = 0; i < 4; ++i) {
    waiting.emplace_back([&] {
      CHECK_THROWS(ring->acquire(), Error, error.kind == ErrorKind::usage);
      ++woken;
    });
  }
  ring->stop();
  for (std::thread& thread : waiting) thread.join();
  CHECK(woken == 4);
}

TEST(a_device_that_fails_is_told_to_all_who_wait) {
  FakeDevice device;
  const auto ring = PinnedRing::make(1, from(device));
  const auto go_on = device.hold();
  PinnedRing::Lease lease = ring->acquire();
  device.mark_slot(*lease);
  lease.release_to_device();
  std::vector<std::thread> waiting;
  std::atomic<int> told{0};
  for (int i = 0; i < 4; ++i) {
    waiting.emplace_back([&] {
      CHECK_THROWS(ring->acquire(), Error, error.kind == ErrorKind::device_memory);
      ++told;
    });
  }
  // All wait, and one of them asks; who comes later asks by itself.
  while (ring->stats().wait_ns == 0) std::this_thread::yield();
  device.fails = true;
  for (std::thread& thread : waiting) thread.join();
  CHECK(told == 4);
  CHECK_THROWS(ring->acquire(), Error, error.kind == ErrorKind::device_memory);
  device.fails = false;
  CHECK_THROWS(ring->acquire(), Error, error.kind == ErrorKind::device_memory);  // nor does it come back
  go_on();
}

TEST(many_threads_never_share_a_slot) {
  FakeDevice device;
  const auto ring = PinnedRing::make(3, from(device));
  constexpr int kThreads = 6, kRounds = 400;
  std::vector<std::unique_ptr<FakeDevice::Block>> blocks;
  for (int i = 0; i < kThreads; ++i) blocks.push_back(std::make_unique<FakeDevice::Block>(4096 * 4));
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < kRounds; ++round) {
        PinnedRing::Lease lease = ring->acquire();
        std::memset(lease->data(), t * 31 + round, 4096);
        if (round % 7 == 0) continue;  // back as idle
        device.copy(*lease, 0, *blocks[t], 4096 * (round % 4), 4096);
        device.mark_slot(*lease);
        lease.release_to_device();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  device.await_all();
  for (int t = 0; t < kThreads; ++t) {
    for (int part = 0; part < 4; ++part) {
      int last = kRounds - 4 + part;
      if (last % 7 == 0) last -= 4;
      for (int i = 0; i < 4096; ++i) CHECK(blocks[t]->bytes[4096 * part + i] == static_cast<char>(t * 31 + last));
    }
  }
}

TEST(a_forked_child_lets_go_of_nothing) {
  FakeDevice device;
  auto ring = PinnedRing::make(2, from(device));
  PinnedRing::Lease(ring->acquire());
  const pid_t child = ::fork();
  if (child == 0) {
    ring = nullptr;
    ::_exit(0);
  }
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  ring = nullptr;
}
