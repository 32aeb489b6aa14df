#include "threads/widening.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "check.h"
#include "threads/ordered_pool.h"

using namespace weightload;
using Seconds = Widening::Seconds;

namespace {

constexpr uint64_t kBytes = 8 << 20;

// Runs tasks, as many at once as it says, each of which takes so long at a width. Returns the width in the end.
template <typename Took>
unsigned widest(Widening& widening, const Took& took, int tasks) {
  struct Running {
    unsigned step;
    Seconds took;
  };
  std::deque<Running> running;
  for (int task = 0; task < tasks; ++task) {
    while (running.size() >= widening.width()) {
      const Running first = running.front();
      running.pop_front();
      widening.ended(first.step, kBytes, first.took);
    }
    running.push_back({widening.step(), Seconds(took(widening.width()))});
  }
  return widening.width();
}

}  // namespace

TEST(grows_while_each_request_has_a_rate_of_its_own) {
  Widening widening({16, 64});
  CHECK(widening.width() == 16);
  CHECK(widest(widening, [](unsigned) { return 0.1; }, 400) == 64);
}

TEST(grows_as_far_as_latency_asks_for) {
  // A network of 1 GB/s that answers 100 ms late: 8 MiB are on the way for 8 ms, so 13 fill it, and 16 do.
  const auto late = [](unsigned width) { return std::max(0.1 + 0.0084, width * 0.0084); };
  Widening enough({16, 64});
  CHECK(widest(enough, late, 400) == 16);
  Widening few({4, 64});
  CHECK(widest(few, late, 400) == 16);
}

TEST(goes_back_where_more_bring_no_more) {
  Widening widening({16, 64});
  unsigned most = 0;
  const auto shared = [&](unsigned width) {
    most = std::max(most, width);
    return width * 0.01;
  };
  CHECK(widest(widening, shared, 400) == 16);
  CHECK(most == 32);
}

TEST(does_not_grow_beyond_the_most) {
  Widening widening({16, 24});
  CHECK(widest(widening, [](unsigned) { return 0.1; }, 400) == 24);
  Widening fixed(Threads(16));
  CHECK(widest(fixed, [](unsigned) { return 0.1; }, 400) == 16);
  Widening one({3, 2});
  CHECK(one.width() == 2);
}

TEST(tasks_of_a_time_when_some_had_nothing_to_do_tell_nothing) {
  Widening widening({2, 64});
  for (int task = 0; task < 100; ++task) {
    const unsigned step = widening.step();
    widening.starved();
    CHECK(!widening.ended(step, kBytes, Seconds(0.1)));
  }
  CHECK(widening.width() == 2);
}

TEST(no_bytes_and_no_time_are_no_rate) {
  Widening widening({2, 64});
  for (int task = 0; task < 100; ++task) widening.ended(widening.step(), 0, Seconds(0));
  CHECK(widening.width() == 2);
}

// Tasks that each wait until as many run as may: no clock, only who is there.
TEST(a_pool_runs_as_many_as_pay) {
  constexpr size_t kTasks = 400;
  std::vector<uint64_t> ends(kTasks);
  for (size_t task = 0; task < kTasks; ++task) ends[task] = (task + 1) * kBytes;
  std::atomic<int> running{0};
  std::atomic<int> most{0};
  OrderedPool pool(ends, {2, 8}, std::numeric_limits<uint64_t>::max(), [&](size_t, const Look&) {
    const int now = ++running;
    for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) {
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // a round trip: the same for all, however many
    --running;
  });
  CHECK(pool.thread_count() == 8);
  CHECK(pool.wait(kTasks - 1, std::chrono::minutes(1)));
  CHECK(most > 2);
  CHECK(most <= 8);
}

TEST(a_pool_begins_with_few) {
  constexpr size_t kTasks = 64;
  std::vector<uint64_t> ends(kTasks);
  for (size_t task = 0; task < kTasks; ++task) ends[task] = task + 1;
  std::mutex mutex;
  std::condition_variable changed;
  size_t inside = 0;
  bool go = false;
  OrderedPool pool(ends, {3, 16}, std::numeric_limits<uint64_t>::max(), [&](size_t, const Look&) {
    std::unique_lock<std::mutex> lock(mutex);
    ++inside;
    changed.notify_all();
    changed.wait(lock, [&] { return go; });
    --inside;
  });
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [&] { return inside == 3; });
  lock.unlock();
  pool.advance(0);  // wakes those that wait
  CHECK(!pool.wait(0, std::chrono::milliseconds(50)));
  lock.lock();
  CHECK(inside == 3);
  go = true;
  changed.notify_all();
  lock.unlock();
  CHECK(pool.wait(kTasks - 1, std::chrono::minutes(1)));
}
