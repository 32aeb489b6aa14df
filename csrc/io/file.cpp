#include "io/file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <utility>

#include "base/error.h"
#include "io/fault_hook.h"

namespace weightload {

File::File(std::string path, UniqueFd fd, uint64_t size, uint64_t device)
    : path_(std::move(path)), fd_(std::move(fd)), size_(size), device_(device) {}

std::shared_ptr<const File> File::open(const std::string& path) {
  int number;
  do {
    number = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  } while (number < 0 && errno == EINTR);
  if (number < 0) throw Error(ErrorKind::open, "cannot open the file", {path, {}, {}, errno});
  UniqueFd fd(number);

  struct stat status;
  if (::fstat(fd.get(), &status) != 0)
    throw Error(ErrorKind::open, "cannot read the file's status", {path, {}, {}, errno});
  if (!S_ISREG(status.st_mode)) {
    throw Error(ErrorKind::header,
                S_ISDIR(status.st_mode) ? "is a directory, not a regular file" : "is not a regular file",
                {path, {}, {}, 0}, "NotARegularFile");
  }
  return std::shared_ptr<const File>(
      new File(path, std::move(fd), static_cast<uint64_t>(status.st_size), status.st_dev));
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

}  // namespace weightload
