#include "file/file_stamp.h"

#include <algorithm>
#include <cstdio>

namespace weightload {
namespace {

using std::chrono::nanoseconds;

// Clocks that count whole seconds, and servers that answer with the time of a second ago.
constexpr nanoseconds kOutOfStep = std::chrono::milliseconds(2500);

// A server may answer anything: what is beyond the year 2096 counts as that, so that no sum overflows.
nanoseconds as_duration(const struct timespec& time) {
  constexpr int64_t kFar = 4'000'000'000;
  return std::chrono::seconds(std::clamp<int64_t>(time.tv_sec, -kFar, kFar)) + nanoseconds(time.tv_nsec);
}

// Seconds since 1970 with all digits that the file system keeps.
std::string text_of(const struct timespec& time) {
  char buffer[48];
  std::snprintf(buffer, sizeof(buffer), "%lld.%09ld", static_cast<long long>(time.tv_sec), time.tv_nsec);
  return buffer;
}

}  // namespace

FileStamp stamp_of(const struct stat& status) {
  return {status.st_dev, status.st_ino, static_cast<uint64_t>(status.st_size), status.st_mtim, status.st_ctim};
}

bool same_time(const struct timespec& one, const struct timespec& other) {
  return one.tv_sec == other.tv_sec && one.tv_nsec == other.tv_nsec;
}

bool same_bytes(const FileStamp& opened, const FileStamp& now, bool coarse) {
  if (opened.size != now.size) return false;
  if (same_time(opened.modified, now.modified)) return true;
  return coarse && opened.modified.tv_sec == now.modified.tv_sec &&
         (opened.modified.tv_nsec == 0 || now.modified.tv_nsec == 0);
}

bool moves_with_time(const AskedStamp& opened, const AskedStamp& now) {
  const nanoseconds passed = now.at - opened.at;
  const nanoseconds ran = as_duration(now.stamp.modified) - as_duration(opened.stamp.modified);
  return std::max(passed, ran) - std::min(passed, ran) < kOutOfStep;
}

Times judge_times(const AskedStamp& opened, const std::vector<AskedStamp>& asked) {
  bool moved = false, backwards = false, status_stands = true, in_step = true;
  for (size_t i = 0; i < asked.size(); ++i) {
    const AskedStamp& now = asked[i];
    if (now.stamp.size != opened.stamp.size) return Times::tell;
    if (i > 0) {
      const nanoseconds modified = as_duration(now.stamp.modified);
      const nanoseconds before = as_duration(asked[i - 1].stamp.modified);
      moved = moved || modified != before;
      backwards = backwards || modified < before;
    }
    status_stands = status_stands && same_time(now.stamp.status_time, opened.stamp.status_time);
    in_step = in_step && moves_with_time(opened, now);
  }
  if (!moved) return Times::tell;
  if (status_stands) return Times::modified_moves;
  return backwards || in_step ? Times::move : Times::tell;
}

std::string difference(const FileStamp& opened, const FileStamp& now) {
  if (opened.size != now.size)
    return "it had " + std::to_string(opened.size) + " bytes and has " + std::to_string(now.size);
  if (!same_time(opened.modified, now.modified))
    return "it was modified at " + text_of(opened.modified) + " and again at " + text_of(now.modified);
  return "its status is of " + text_of(now.status_time) + " and was of " + text_of(opened.status_time);
}

}  // namespace weightload
