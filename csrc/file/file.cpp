#include "file/file.h"

#include <fcntl.h>
#include <sys/vfs.h>

#include <cerrno>
#include <utility>

#include "base/error.h"
#include "base/uninterrupted.h"
#include "file/fault_hook.h"

namespace weightload {

namespace {

void require_regular(const struct stat& status, const std::string& path) {
  if (S_ISREG(status.st_mode)) return;
  throw Error(
      ErrorKind::header,
      S_ISDIR(status.st_mode)
          ? "is a directory, not a regular file; resolve_safetensors_files() lists the files of the checkpoint in it"
          : "is not a regular file",
      {path, {}, {}, 0}, "NotARegularFile");
}

[[noreturn]] void fail_open(const std::string& path, int error, const char* what = "cannot open the file") {
  throw Error(ErrorKind::open, what, {path, {}, {}, error});
}

// 0 where the system does not say.
uint64_t file_system_of(int fd) {
  struct statfs status;
  return uninterrupted([&] { return fault_hook::fstatfs(fd, &status); }) == 0 ? static_cast<unsigned>(status.f_type)
                                                                              : 0;
}

}  // namespace

File::File(std::string path, UniqueFd fd, const struct stat& status, uint64_t file_system)
    : path_(std::move(path)),
      size_(static_cast<uint64_t>(status.st_size)),
      device_(status.st_dev),
      file_system_(file_system),
      watch_(status, file_system),
      kept_(std::move(fd)) {}

std::shared_ptr<const File> File::open(const std::string& path, const std::function<void()>& pause) {
  struct stat status;
  if (uninterrupted([&] { return fault_hook::stat(path.c_str(), &status); }) != 0) fail_open(path, errno);
  require_regular(status, path);

  // Not to wait, should the name stand for a FIFO by now.
  UniqueFd fd = open_files::open(path, pause);
  if (!fd) fail_open(path, errno);

  if (uninterrupted([&] { return fault_hook::fstat(fd.get(), &status); }) != 0)
    fail_open(path, errno, "cannot read the file's status");
  require_regular(status, path);
  const uint64_t file_system = file_system_of(fd.get());
  return std::shared_ptr<const File>(new File(path, std::move(fd), status, file_system));
}

open_files::Lease File::descriptor() const {
  if (open_files::Lease lease = kept_.lease()) return lease;
  const std::string name = kept_.name();
  try {
    UniqueFd fd = open_files::open(name.empty() ? path_ : name, [] {});
    if (const int error = errno; !fd)
      throw Error(ErrorKind::read, "cannot open the file again", {path_, {}, {}, error});
    watch_.require_same(fd.get(), path_, 0);
    return kept_.put_back(std::move(fd));
  } catch (const Error& error) {
    const std::string why = "it had been closed since there may be " + std::to_string(open_files::limit()) +
                            " open files (`ulimit -n`): " + error.message;
    throw Error(error.kind, why, error.context);
  }
}

void File::read(uint64_t offset, void* destination, size_t count) const {
  const open_files::Lease lease = descriptor();
  char* cursor = static_cast<char*>(destination);
  size_t left = count;
  while (left > 0) {
    const ssize_t got = fault_hook::pread(lease.get(), cursor, left, static_cast<off_t>(offset));
    if (got < 0) {
      const int error = errno;  // before an allocation, which may set it
      if (error == EINTR) continue;
      throw Error(ErrorKind::read, "cannot read " + std::to_string(left) + " bytes", {path_, {}, offset, error});
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
    ::posix_fadvise(descriptor().get(), 0, 0, wanted ? POSIX_FADV_NORMAL : POSIX_FADV_RANDOM);
}

void File::require_unchanged(uint64_t offset) const { watch_.require_unchanged(descriptor().get(), path_, offset); }

void File::remember_start(std::string_view bytes) const {
  if (watch_.doubts_times()) watch_.remember_start(bytes);
}

}  // namespace weightload
