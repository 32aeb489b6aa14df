#include "io/file.h"

#include <fcntl.h>

#include <cerrno>
#include <cstdio>
#include <utility>

#include "base/error.h"
#include "io/fault_hook.h"

namespace weightload {

namespace {

void require_regular(const struct stat& status, const std::string& path) {
  if (S_ISREG(status.st_mode)) return;
  throw Error(ErrorKind::header,
              S_ISDIR(status.st_mode) ? "is a directory, not a regular file" : "is not a regular file",
              {path, {}, {}, 0}, "NotARegularFile");
}

// Seconds since 1970 with all digits that the file system keeps.
std::string text_of(const struct timespec& time) {
  char buffer[48];
  std::snprintf(buffer, sizeof(buffer), "%lld.%09ld", static_cast<long long>(time.tv_sec), time.tv_nsec);
  return buffer;
}

}  // namespace

File::File(std::string path, UniqueFd fd, const struct stat& status)
    : path_(std::move(path)),
      fd_(std::move(fd)),
      size_(static_cast<uint64_t>(status.st_size)),
      device_(status.st_dev),
      modified_(status.st_mtim) {}

std::shared_ptr<const File> File::open(const std::string& path) {
  struct stat status;
  if (::stat(path.c_str(), &status) != 0) throw Error(ErrorKind::open, "cannot open the file", {path, {}, {}, errno});
  require_regular(status, path);

  // Not to wait, should the name stand for a FIFO by now.
  int number;
  do {
    number = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  } while (number < 0 && errno == EINTR);
  if (number < 0) throw Error(ErrorKind::open, "cannot open the file", {path, {}, {}, errno});
  UniqueFd fd(number);

  if (::fstat(fd.get(), &status) != 0)
    throw Error(ErrorKind::open, "cannot read the file's status", {path, {}, {}, errno});
  require_regular(status, path);
  return std::shared_ptr<const File>(new File(path, std::move(fd), status));
}

void File::read(uint64_t offset, void* destination, size_t count) const {
  char* cursor = static_cast<char*>(destination);
  size_t left = count;
  while (left > 0) {
    const ssize_t got = fault_hook::pread(fd_.get(), cursor, left, static_cast<off_t>(offset));
    if (got < 0) {
      if (errno == EINTR) continue;
      throw Error(ErrorKind::read, "cannot read " + std::to_string(left) + " bytes", {path_, {}, offset, errno});
    }
    if (got == 0) {
      throw Error(ErrorKind::read,
                  "the file ended " + std::to_string(left) + " bytes early (it had " + std::to_string(size_) +
                      " bytes when it was opened), looked for them",
                  {path_, {}, offset, 0});
    }
    cursor += got;
    offset += static_cast<uint64_t>(got);
    left -= static_cast<size_t>(got);
  }
}

void File::read_on(bool wanted) const {
  if (reads_on_.load(std::memory_order_relaxed) == wanted) return;
  if (reads_on_.exchange(wanted) != wanted)
    ::posix_fadvise(fd_.get(), 0, 0, wanted ? POSIX_FADV_NORMAL : POSIX_FADV_RANDOM);
}

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
void File::require_unchanged(uint64_t offset) const {
  struct stat now;
  if (::fstat(fd_.get(), &now) != 0)
    throw Error(ErrorKind::read, "cannot read the file's status", {path_, {}, offset, errno});
  const auto size = static_cast<uint64_t>(now.st_size);
  if (size == size_ && now.st_mtim.tv_sec == modified_.tv_sec && now.st_mtim.tv_nsec == modified_.tv_nsec) return;
  const std::string how = size != size_
                              ? "it had " + std::to_string(size_) + " bytes and has " + std::to_string(size)
                              : "it was modified at " + text_of(modified_) + " and again at " + text_of(now.st_mtim);
  throw Error(ErrorKind::read, "the file was changed while it was read (" + how + "); noticed", {path_, {}, offset, 0});
}

}  // namespace weightload
