// What the times of a file say, and when they say nothing: tables of the pure comparison.
#include "file/file_stamp.h"

#include <initializer_list>

#include "check.h"

using namespace weightload;

namespace {

constexpr uint64_t kSize = 1000;

struct timespec at(int64_t seconds, long nanoseconds = 0) {
  struct timespec time{};
  time.tv_sec = seconds;
  time.tv_nsec = nanoseconds;
  return time;
}

FileStamp stamp(struct timespec modified, struct timespec status, uint64_t size = kSize) {
  return {1, 2, size, modified, status};
}

AskedStamp asked(int64_t milliseconds, FileStamp stamp) { return {stamp, std::chrono::milliseconds(milliseconds)}; }

}  // namespace

TEST(size_and_time_of_modification_tell_a_change) {
  struct Row {
    FileStamp opened, now;
    bool coarse, same;
  };
  const auto open = stamp(at(100, 5), at(100, 5));
  const std::initializer_list<Row> rows = {
      {open, open, false, true},
      {open, stamp(at(100, 5), at(900)), false, true},  // renamed over, unlinked, chmod
      {open, stamp(at(100, 6), at(100, 5)), false, false},
      {open, stamp(at(99, 5), at(100, 5)), false, false},
      {open, stamp(at(100, 5), at(100, 5), kSize + 1), false, false},
      {open, stamp(at(100, 5), at(100, 5), 0), true, false},
      {open, stamp(at(100, 0), at(100, 0)), false, false},
      {open, stamp(at(100, 0), at(100, 0)), true, true},  // a fraction that was forgotten
      {stamp(at(100, 0), at(100)), open, true, true},
      {open, stamp(at(100, 6), at(100, 0)), true, false},
      {open, stamp(at(101, 0), at(100, 0)), true, false},
      {stamp(at(1, 0), at(0)), stamp(at(4'000'000'000, 0), at(0)), false, false},
  };
  int number = 0;
  for (const Row& row : rows) {
    std::printf("  row %d\n", number++);
    CHECK(same_bytes(row.opened, row.now, row.coarse) == row.same);
  }
}

TEST(times_that_move_by_themselves_are_told_from_changes) {
  struct Row {
    const char* what;
    AskedStamp opened;
    std::vector<AskedStamp> asked;
    Times times;
  };
  constexpr int64_t kFar = INT64_MAX;
  const auto old = asked(0, stamp(at(100), at(100)));
  const auto now = asked(0, stamp(at(5000), at(5000)));
  const std::initializer_list<Row> rows = {
      {"written once", old, {asked(50, stamp(at(5000), at(5000))), asked(53, stamp(at(5000), at(5000)))}, Times::tell},
      {"written on and on, from after the opening",
       old,
       {asked(50, stamp(at(5000, 1), at(5000, 1))), asked(53, stamp(at(5000, 9), at(5000, 9)))},
       Times::tell},
      {"longer and longer",
       now,
       {asked(50, stamp(at(5000, 1), at(5000, 1))), asked(53, stamp(at(5000, 9), at(5000, 9), kSize + 1))},
       Times::tell},
      {"set back", old, {asked(50, stamp(at(50), at(5000))), asked(53, stamp(at(50), at(5000)))}, Times::tell},
      {"only the time of modification is now",
       now,
       {asked(50, stamp(at(5000, 1), at(5000))), asked(53, stamp(at(5000, 9), at(5000)))},
       Times::modified_moves},
      {"all times are now",
       now,
       {asked(50, stamp(at(5000, 50), at(5000, 50))), asked(53, stamp(at(5000, 53), at(5000, 53)))},
       Times::move},
      {"now, in whole seconds",
       now,
       {asked(1000, stamp(at(5001), at(5001))), asked(1003, stamp(at(5001), at(5001))),
        asked(2103, stamp(at(5002), at(5002)))},
       Times::move},
      {"now, in whole seconds, asked too soon",
       now,
       {asked(1000, stamp(at(5001), at(5001))), asked(1003, stamp(at(5001), at(5001)))},
       Times::tell},
      {"at random", old, {asked(50, stamp(at(7000), at(3))), asked(53, stamp(at(200), at(9000)))}, Times::move},
      {"out of all bounds",
       asked(0, stamp(at(-kFar), at(-kFar))),
       {asked(50, stamp(at(kFar), at(kFar))), asked(53, stamp(at(-kFar), at(-kFar)))},
       Times::move},
      {"an answer is missing", old, {asked(50, stamp(at(5000), at(5000)))}, Times::tell},
  };
  for (const Row& row : rows) {
    std::printf("  %s\n", row.what);
    CHECK(judge_times(row.opened, row.asked) == row.times);
  }
}

TEST(the_difference_is_said_in_words) {
  const auto opened = stamp(at(100, 5), at(100, 5));
  CHECK(difference(opened, stamp(at(100, 5), at(100, 5), 7)) == "it had 1000 bytes and has 7");
  CHECK(difference(opened, stamp(at(101), at(101))) == "it was modified at 100.000000005 and again at 101.000000000");
  CHECK(difference(opened, stamp(at(100, 5), at(102))) == "its status is of 102.000000000 and was of 100.000000005");
}
