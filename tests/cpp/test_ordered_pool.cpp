#include "threads/ordered_pool.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "check.h"

using namespace weightload;
using std::chrono::milliseconds;

namespace {

constexpr milliseconds kLong{60'000};

std::vector<uint64_t> equal_ends(size_t tasks, uint64_t bytes) {
  std::vector<uint64_t> ends(tasks);
  for (size_t i = 0; i < tasks; ++i) ends[i] = (i + 1) * bytes;
  return ends;
}

// Lets one thread wait until another has said so.
class Gate {
 public:
  void open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

}  // namespace

TEST(every_task_runs_once_and_is_seen_done_in_order) {
  for (unsigned threads : {1u, 2u, 7u}) {
    std::vector<std::atomic<int>> runs(500);
    OrderedPool pool(equal_ends(500, 10), threads, 100, [&](size_t task, const Look&) { ++runs[task]; });
    for (size_t task = 0; task < 500; ++task) {
      pool.advance(task);
      CHECK(pool.wait(task, kLong));
      for (size_t i = 0; i <= task; ++i) CHECK(runs[i] == 1);
    }
  }
}

TEST(no_task_starts_beyond_the_window) {
  std::atomic<size_t> highest{0};
  std::atomic<size_t> needed{0};
  std::atomic<bool> too_far{false};
  OrderedPool pool(equal_ends(300, 10), 4, 50, [&](size_t task, const Look&) {
    // 50 bytes of 10 each may lie between the end of what is needed and the start of a task.
    if (task > needed.load() + 5) too_far = true;
    size_t seen = highest.load();
    while (task > seen && !highest.compare_exchange_weak(seen, task)) {
    }
  });
  for (size_t task = 0; task < 300; ++task) {
    needed = task;
    pool.advance(task);
    CHECK(pool.wait(task, kLong));
  }
  CHECK(!too_far);
  CHECK(highest == 299);
}

TEST(what_is_needed_starts_however_large_it_is) {
  OrderedPool pool(equal_ends(100, 1000), 2, 10, [](size_t, const Look&) {});
  pool.advance(99);  // one tensor of all tasks, far larger than the window
  CHECK(pool.wait(99, kLong));
}

TEST(the_lowest_failure_wins_and_what_lies_before_is_delivered) {
  Gate later_failed;
  OrderedPool pool(equal_ends(20, 1), 4, 1000, [&](size_t task, const Look&) {
    if (task == 6) {
      later_failed.open();
      throw std::runtime_error("6");
    }
    if (task == 5) {
      later_failed.wait();
      throw std::runtime_error("5");
    }
  });
  pool.advance(4);
  CHECK(pool.wait(4, kLong));
  CHECK_THROWS(pool.wait(5, kLong), std::runtime_error, error.what() == std::string("5"));
  CHECK_THROWS(pool.wait(19, kLong), std::runtime_error, error.what() == std::string("5"));
  CHECK(pool.wait(4, kLong));
}

TEST(what_is_waited_for_wakes_the_waiter) {
  for (int round = 0; round < 300; ++round) {
    OrderedPool pool(equal_ends(8, 1), 2, 1000, [](size_t, const Look&) {});
    const auto begin = std::chrono::steady_clock::now();
    CHECK(pool.wait(7, kLong));
    // A notification that never came would be made up for when the patience ends.
    CHECK(std::chrono::steady_clock::now() - begin < kLong);
  }
}

TEST(waiting_has_an_end) {
  Gate gate;
  OrderedPool pool(equal_ends(1, 1), 1, 1, [&](size_t, const Look&) { gate.wait(); });
  CHECK(!pool.wait(0, milliseconds(1)));
  gate.open();
  CHECK(pool.wait(0, kLong));
}

TEST(stop_wakes_a_waiter_and_starts_nothing_further) {
  Gate started, go_on;
  std::atomic<int> runs{0};
  OrderedPool pool(equal_ends(100, 1), 1, 1000, [&](size_t, const Look&) {
    ++runs;
    started.open();
    go_on.wait();
  });
  std::thread waiter([&] { CHECK(!pool.wait(50, kLong)); });
  started.wait();
  pool.stop();
  waiter.join();
  go_on.open();
  pool.join();
  CHECK(runs == 1);
}

TEST(destruction_in_the_middle_joins) {
  for (int round = 0; round < 200; ++round) {
    std::atomic<int> inside{0};
    {
      OrderedPool pool(equal_ends(1000, 1), 3, 100, [&](size_t, const Look&) {
        ++inside;
        --inside;
      });
      pool.wait(static_cast<size_t>(round), milliseconds(1));
    }
    CHECK(inside == 0);
  }
}

TEST(no_tasks_no_threads) {
  OrderedPool pool({}, 4, 1, [](size_t, const Look&) { CHECK(false); });
  pool.stop();
}
