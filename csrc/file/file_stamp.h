#pragma once
#include <sys/stat.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace weightload {

// What a file system says of a file, of which a change of the file's bytes alters something. Pure.
struct FileStamp {
  uint64_t device = 0;
  uint64_t inode = 0;
  uint64_t size = 0;              // bytes
  struct timespec modified{};     // of the bytes
  struct timespec status_time{};  // of the bytes or the status (ctime)
};

FileStamp stamp_of(const struct stat& status);

bool same_time(const struct timespec& one, const struct timespec& other);

// Whether size and time of modification are those of the opening. `coarse`: of a file system that may forget a time's
// fraction of a second, as clients of networks do when they ask the server anew.
bool same_bytes(const FileStamp& opened, const FileStamp& now, bool coarse);

// A stamp, and when it was asked for.
struct AskedStamp {
  FileStamp stamp;
  std::chrono::nanoseconds at{0};  // of a clock that runs evenly
};

enum class Times : uint8_t {
  tell,            // what they are for: the file was changed where they differ
  move,            // they move by themselves, all of them
  modified_moves,  // that of the modification moves by itself; that of the status stands
};

// Whether the time of modification has moved by as much as has passed: to now, each time that it is asked for.
bool moves_with_time(const AskedStamp& opened, const AskedStamp& now);

// Of a file whose time of modification is not that of the opening: whether that says anything. `asked` are two answers
// at least, in the order of time, the last of which are newer than what the system has cached.
//
// Times move by themselves where one answer differs from the next, and
// - the time of the status is that of the opening, which a write would alter, too; or
// - they run backwards; or
// - they move with time, counted from the opening.
// Somebody who has been writing from before the opening on looks like the last of these, and goes unnoticed.
Times judge_times(const AskedStamp& opened, const std::vector<AskedStamp>& asked);

// What differs, in words; to follow "the file was changed while it was read".
std::string difference(const FileStamp& opened, const FileStamp& now);

}  // namespace weightload
