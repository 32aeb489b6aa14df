#include "file/change_watch.h"

#include <fcntl.h>
#include <linux/magic.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/uninterrupted.h"
#include "file/fault_hook.h"

// Note [Changed files]
// A file that is overwritten in place cannot be kept as it was; but it can be noticed. The kernel stamps a file with
// the time of a write before it copies the bytes, so whoever reads a new byte and then asks for the stamp sees a new
// one. Size and time of modification as they were at the opening, asked after the last read: all bytes are of then.
//
// The time of the last *status* change is not looked at: a rename over the file, an unlink, a hard link and a chmod
// alter it, and the bytes behind the descriptor stay what they were. `touch` is taken for a change.
//
// What goes unnoticed: writing within one tick of the kernel's clock (1 to 10 ms) of a write before the opening, on
// file systems without finer stamps (ext4, XFS, Btrfs and tmpfs have them since Linux 6.13); writing through a shared
// mapping whose pages are dirty already; a program that sets the time back; another client of
// a network file system, for as long as attributes are cached here.
//
// Note [Times that mean nothing]
// That is true of the kernel's own file systems. A server, or a program in user space, may answer with any time: with
// now, each time that it is asked, or with the same for ever. So there, when nothing but the time of modification
// differs, it is asked anew, past what the system has cached, and again after 1.1 s if need be (clocks that count whole
// seconds), and judge_times() says whether the times move by themselves. If they do, the rest of the load goes by the
// size, by the time of the status if that stands, and by the header's bytes, which are read again: as often as takes a
// tenth of the time. In user space the header is read again in any case, for a hundredth of the time, since a time that
// stands still for ever looks like that of a file at rest.
//
// What goes unnoticed there: other bytes of the same number behind the same header. And the header that is read again
// may come from this machine's page cache, whose pages are dropped before if nobody has mapped them.

namespace weightload {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kBtrfs = 0x9123683e, kBcachefs = 0xca451a4e, kExt = 0xef53, kF2fs = 0xf2f52010, kXfs = 0x58465342,
                   kZfs = 0x2fc12fc1;

constexpr std::chrono::milliseconds kSoon{3}, kSecondsClock{1100};

// The header is compared for one part in so many of the time, and not before so long after the opening.
constexpr int64_t kShareWhenMoving = 10, kShareInUserSpace = 100;
constexpr std::chrono::nanoseconds kFirstCheck = std::chrono::milliseconds(10);

bool has_times_of_the_kernel(uint64_t file_system) {
  for (const uint64_t known : {kExt, kXfs, kBtrfs, kF2fs, kZfs, kBcachefs, uint64_t{TMPFS_MAGIC}, uint64_t{RAMFS_MAGIC},
                               uint64_t{HUGETLBFS_MAGIC}, uint64_t{OVERLAYFS_SUPER_MAGIC}}) {
    if (file_system == known) return true;
  }
  return false;
}

constexpr uint64_t kFuse = 0x65735546;

// Mounts in user space whose times were found to move, so that each of a checkpoint's files need not wait for that: a
// device's number and how they move. Numbers come again, so it is believed of files that move with time only. No lock:
// a forked child goes on with what is there.
std::array<std::atomic<uint64_t>, 32> moving_mounts{};

uint64_t mark_of(uint64_t device, Times times) { return (device << 1 | (times == Times::move ? 1 : 0)) + 1; }

void remember_mount(uint64_t device, Times times) {
  for (auto& mark : moving_mounts) {
    uint64_t empty = 0;
    if (mark.compare_exchange_strong(empty, mark_of(device, times))) return;
    if (empty == mark_of(device, times)) return;
  }
}

Times times_of_mount(uint64_t device) {
  for (const auto& mark : moving_mounts) {
    const uint64_t found = mark.load(std::memory_order_relaxed);
    for (const Times times : {Times::move, Times::modified_moves})
      if (found == mark_of(device, times)) return times;
  }
  return Times::tell;
}

std::chrono::nanoseconds time_now() { return Clock::now().time_since_epoch(); }

AskedStamp ask(int fd, const std::string& path, uint64_t offset) {
  struct stat status;
  if (uninterrupted([&] { return fault_hook::fstat(fd, &status); }) != 0) {
    const int error = errno;
    throw Error(ErrorKind::read, "cannot read the file's status", {path, {}, offset, error});
  }
  return {stamp_of(status), {}};
}

struct timespec time_of(const struct statx_timestamp& time) {
  struct timespec result{};
  result.tv_sec = time.tv_sec;
  result.tv_nsec = time.tv_nsec;
  return result;
}

// From the server, whatever the system has cached.
AskedStamp ask_server(int fd, AskedStamp otherwise) {
  struct statx status;
  otherwise.at = time_now();
  if (uninterrupted([&] { return fault_hook::statx_of(fd, AT_STATX_FORCE_SYNC, &status); }) != 0) return otherwise;
  otherwise.stamp.size = status.stx_size;
  otherwise.stamp.modified = time_of(status.stx_mtime);
  otherwise.stamp.status_time = time_of(status.stx_ctime);
  return otherwise;
}

}  // namespace

ChangeWatch::ChangeWatch(const struct stat& status, uint64_t file_system)
    : opened_{stamp_of(status), time_now()},
      doubts_(!has_times_of_the_kernel(file_system)),
      user_space_(file_system == kFuse || file_system == 0) {}

void ChangeWatch::remember_start(std::string_view bytes) const {
  start_bytes_ = bytes.size();
  start_digest_ = std::hash<std::string_view>()(bytes);
  start_due_ = (time_now() + kFirstCheck).count();
}

void ChangeWatch::require_unchanged(int fd, const std::string& path, uint64_t offset) const {
  AskedStamp now = ask(fd, path, offset);
  // A short direct read makes the system think that a file in user space has shrunk.
  if (doubts_ && now.stamp.size != opened_.stamp.size) now = ask_server(fd, now);
  Times times = times_.load(std::memory_order_relaxed);
  if (times == Times::tell) {
    if (!same_bytes(opened_.stamp, now.stamp, doubts_)) {
      if (!doubts_ || now.stamp.size != opened_.stamp.size) fail(now.stamp, path, offset);
      watch(fd, now, path, offset);
      times = times_.load(std::memory_order_relaxed);
    } else if (!user_space_) {
      return;
    }
  }
  if (now.stamp.size != opened_.stamp.size) fail(now.stamp, path, offset);
  const bool status_stands = same_time(now.stamp.status_time, opened_.stamp.status_time);
  if (times == Times::modified_moves && !status_stands) {
    now.stamp.modified = opened_.stamp.modified;  // not what tells it
    fail(now.stamp, path, offset);
  }
  if (start_is_due()) require_same_start(fd, path, offset);
}

void ChangeWatch::require_same(int fd, const std::string& path, uint64_t offset) const {
  const FileStamp now = ask(fd, path, offset).stamp;
  const bool same_number = now.device == opened_.stamp.device && now.inode == opened_.stamp.inode;
  // Programs in user space may number a file anew each time that it is looked up.
  if (now.device != opened_.stamp.device || (!same_number && !user_space_))
    throw Error(ErrorKind::read, "another file has its name now; noticed", {path, {}, offset, 0});
  require_unchanged(fd, path, offset);
  if (!same_number && start_bytes_ > 0) require_same_start(fd, path, offset);
}

// Takes a few ms, and more than a second if the file was changed: a load that is about to fail.
void ChangeWatch::watch(int fd, const AskedStamp& now, const std::string& path, uint64_t offset) const {
  std::vector<AskedStamp> asked{now};
  asked.front().at = time_now();
  if (user_space_ && moves_with_time(opened_, asked.front())) {
    const Times known = times_of_mount(opened_.stamp.device);
    const bool status_stands = same_time(now.stamp.status_time, opened_.stamp.status_time);
    times_ = known == Times::modified_moves && !status_stands ? Times::tell : known;
    if (times_ != Times::tell) return;
  }
  Times found = Times::tell;
  // The last ones for times without any order, of which four in a row rise by chance once in 24 times.
  for (const std::chrono::milliseconds pause :
       {std::chrono::milliseconds(0), kSoon, kSecondsClock, kSoon, kSoon, kSoon, kSoon}) {
    std::this_thread::sleep_for(pause);
    asked.push_back(ask_server(fd, now));
    found = judge_times(opened_, asked);
    if (found != Times::tell || asked.back().stamp.size != opened_.stamp.size) break;
  }
  if (found == Times::tell) fail(asked.back().stamp, path, offset);
  if (user_space_) remember_mount(opened_.stamp.device, found);
  times_ = found;
}

// One thread at a time.
bool ChangeWatch::start_is_due() const {
  int64_t due = start_due_.load(std::memory_order_relaxed);
  return time_now().count() >= due && start_due_.compare_exchange_strong(due, INT64_MAX);
}

void ChangeWatch::require_same_start(int fd, const std::string& path, uint64_t offset) const {
  const std::chrono::nanoseconds begin = time_now();
  try {
    if (digest_of_start(fd, path) != start_digest_)
      throw Error(ErrorKind::read, "the file was changed while it was read (its header is another one); noticed",
                  {path, {}, offset, 0});
  } catch (const Error&) {
    start_due_ = begin.count();  // whoever asks next hears of it, too
    throw;
  }
  const std::chrono::nanoseconds end = time_now();
  const bool moving = times_.load(std::memory_order_relaxed) != Times::tell;
  start_due_ = (end + (end - begin) * (moving ? kShareWhenMoving : kShareInUserSpace)).count();
}

// From the server, not from pages that are cached here, as far as nobody has mapped them.
size_t ChangeWatch::digest_of_start(int fd, const std::string& path) const {
  static_cast<void>(::posix_fadvise(fd, 0, static_cast<off_t>(start_bytes_), POSIX_FADV_DONTNEED));
  std::string start(start_bytes_, '\0');
  for (size_t at = 0; at < start.size();) {
    const ssize_t got = fault_hook::pread(fd, &start[at], start.size() - at, static_cast<off_t>(at));
    const int error = errno;
    if (got < 0 && error == EINTR) continue;
    if (got < 0) throw Error(ErrorKind::read, "cannot read the file's header again", {path, {}, at, error});
    if (got == 0) start.resize(at);
    at += static_cast<size_t>(got);
  }
  return std::hash<std::string_view>()(start);
}

void ChangeWatch::fail(const FileStamp& now, const std::string& path, uint64_t offset) const {
  const std::string how = difference(opened_.stamp, now);
  throw Error(ErrorKind::read, "the file was changed while it was read (" + how + "); noticed", {path, {}, offset, 0});
}

}  // namespace weightload
