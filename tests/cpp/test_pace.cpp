// How pieces grow on healthy storage and shrink on slow one. Time is simulated: it passes when the test says so.
#include "threads/pace.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <limits>
#include <queue>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "base/start_thread.h"
#include "check.h"
#include "threads/ordered_pool.h"

using namespace weightload;
using std::chrono::milliseconds;

namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kUnlimited = std::numeric_limits<uint64_t>::max();

std::atomic<int64_t> milliseconds_passed{0};

Pace::Clock::time_point simulated_now() { return Pace::Clock::time_point(milliseconds(milliseconds_passed)); }

std::vector<ByteRange> pieces_of(Pace& pace, ByteRange range, milliseconds each = milliseconds(0)) {
  std::vector<ByteRange> pieces;
  pace.in_pieces(range, no_look, [&](ByteRange piece) {
    pieces.push_back(piece);
    milliseconds_passed += each.count();
  });
  return pieces;
}

}  // namespace

TEST(pieces_cover_the_range) {
  for (const ByteRange range : {ByteRange{0, 100 * kMiB}, ByteRange{777, 3 * kMiB + 5}, ByteRange{5, 5}}) {
    Pace pace(4, 3 * kMiB, simulated_now);
    uint64_t at = range.begin;
    for (const ByteRange piece : pieces_of(pace, range)) {
      CHECK(piece.begin == at && piece.end > at && piece.size() <= 3 * kMiB);
      at = piece.end;
    }
    CHECK(at == range.end);
  }
}

TEST(healthy_storage_costs_four_calls_more_a_load) {
  Pace pace(4, kUnlimited, simulated_now);
  CHECK(pieces_of(pace, {0, 8 * kMiB}).size() <= 5);
  pieces_of(pace, {0, 8 * kMiB});
  for (int task = 0; task < 10; ++task) CHECK(pieces_of(pace, {0, 8 * kMiB}).size() == 1);
  CHECK(pace.allows(8 * kMiB));
}

TEST(small_reads_say_something_together) {
  Pace pace(4, kUnlimited, simulated_now);
  for (int read = 0; read < 10'000; ++read) pieces_of(pace, {0, 4096});
  CHECK(pace.allows(4 * kMiB));
}

TEST(what_is_refused_says_nothing_of_the_storage) {
  Pace pace(4, kUnlimited, simulated_now);
  int calls = 0;
  for (int read = 0; read < 100; ++read) {
    pace.in_pieces({0, 8 * kMiB}, no_look, [&](ByteRange) {
      ++calls;
      return false;
    });
  }
  CHECK(calls == 100);
  CHECK(!pace.allows(kMiB));
}

TEST(slow_storage_is_read_in_small_pieces) {
  Pace pace(4, kUnlimited, simulated_now);
  // 400 kB/s
  const auto read = [](ByteRange piece) { milliseconds_passed += static_cast<int64_t>(piece.size() * 5 / 2048); };
  pace.in_pieces({0, kMiB}, no_look, read);
  CHECK(!pace.allows(256 << 10));
}

TEST(what_slows_down_is_read_in_small_pieces_from_then_on) {
  Pace pace(4, kUnlimited, simulated_now);
  pieces_of(pace, {0, 64 * kMiB});
  CHECK(pace.allows(8 * kMiB));
  pieces_of(pace, {0, 8 * kMiB}, milliseconds(2000));
  CHECK(!pace.allows(kMiB));
}

TEST(a_look_ends_the_reading_and_lets_others_go_on) {
  Pace pace(1, kUnlimited, simulated_now);
  int looks = 0;
  const Look look = [&] {
    if (++looks == 2) throw std::runtime_error("enough");
  };
  CHECK_THROWS(pace.in_pieces({0, 100 * kMiB}, look, [](ByteRange) {}), std::runtime_error, looks == 2);
  CHECK(pieces_of(pace, {0, 5}).size() == 1);
}

TEST(who_waits_for_a_turn_is_let_go_by_stop) {
  Pace pace(8);
  std::atomic<bool> stopped{false}, reading{false};
  std::atomic<int> ended{0};
  const Look look = [&] {
    if (stopped) throw std::runtime_error("stopped");
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      try {
        pace.in_pieces({0, 100 * kMiB}, look, [&](ByteRange) {
          reading = true;
          while (!stopped) std::this_thread::yield();
        });
      } catch (const std::runtime_error&) {
        ++ended;
      }
    });
  }
  while (!reading) std::this_thread::yield();
  stopped = true;
  pace.stop();
  for (std::thread& thread : threads) thread.join();
  CHECK(ended == 4);
}

// Storage that answers as many as ask at once, or one after the other (`queue`), 120 ms each. How many of four threads
// read at once at most.
unsigned readers_of(bool queue) {
  struct Answer {
    milliseconds at, begun;
    uint64_t epoch;
    bool full;
    bool operator>(const Answer& other) const { return at > other.at; }
  };
  PaceRule rule(4, 64 << 10);
  std::priority_queue<Answer, std::vector<Answer>, std::greater<>> reading;
  milliseconds now{0}, free{0};  // free: when the queue will have given its last answer
  unsigned most = 0;
  for (int answers = 0; answers < 32; ++answers) {
    while (reading.size() < std::min(rule.allowed(), 4u)) {
      free = std::max(now, free) + milliseconds(120);
      const bool full = reading.size() + 1 >= rule.allowed();
      reading.push({queue ? free : now + milliseconds(120), now, rule.epoch(), full});
    }
    most = std::max(most, static_cast<unsigned>(reading.size()));
    const Answer answer = reading.top();
    reading.pop();
    now = answer.at;
    rule.judge(rule.piece(), now - answer.begun, answer.epoch, answer.full);
  }
  return most;
}

TEST(threads_are_added_where_they_are_of_use) {
  CHECK(readers_of(false) == 4);
  CHECK(readers_of(true) == 2);
}

TEST(added_threads_read_at_once) {
  Pace pace(2, 64 << 10, simulated_now);
  pieces_of(pace, {0, kMiB}, milliseconds(20));
  std::atomic<int> inside{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&] {
      pace.in_pieces({0, 1}, no_look, [&](ByteRange) {
        ++inside;
        while (inside < 2) std::this_thread::yield();
      });
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(without_threads_the_consumer_works_and_is_interrupted) {
  threads_refused() = true;
  int pauses = 0;
  bool interrupt = false;
  const Look pause = [&] {
    ++pauses;
    if (interrupt) throw std::runtime_error("interrupted");
  };
  OrderedPool pool({1, 2, 3}, 2, 1, [](size_t, const Look& look) { look(); }, pause);
  threads_refused() = false;
  CHECK(pool.thread_count() == 0);
  CHECK(!pool.wait(1, milliseconds(0)) && pauses == 0);  // no patience, no work
  CHECK(pool.wait(1, milliseconds(60'000)) && pauses == 2);
  interrupt = true;
  CHECK_THROWS(pool.wait(2, milliseconds(60'000)), std::runtime_error, true);
  pool.stop();
  CHECK(!pool.wait(2, milliseconds(60'000)));
}

TEST(who_stops_the_work_and_throws_is_heard) {
  threads_refused() = true;
  OrderedPool* made = nullptr;
  OrderedPool pool(
      {1}, 1, 1, [](size_t, const Look& look) { look(); },
      [&] {
        made->stop();
        throw std::runtime_error("interrupted");
      });
  threads_refused() = false;
  made = &pool;
  CHECK_THROWS(pool.wait(0, milliseconds(60'000)), std::runtime_error, true);
}
