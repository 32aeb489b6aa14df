#pragma once
#include <sys/stat.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/unique_fd.h"
#include "file/byte_source.h"
#include "file/change_watch.h"
#include "file/open_files.h"

namespace weightload {

// A regular file, opened once for reading. Everything later (header, residency, mapping, reads) goes through
// this descriptor, so a file that is replaced under its name keeps giving the bytes of the one that was
// opened. But where a process has too few descriptors for its files (file/open_files) the file may be closed meanwhile;
// it is then opened again by its name, and must be the same.
class File final : public ByteSource {
 public:
  // Throws Error{open} with errno, or the header rule NotARegularFile for directories, devices, FIFOs and
  // sockets, which are not opened: opening a device may do something, and a FIFO waits for a writer. `pause` as in
  // open_files::open.
  static std::shared_ptr<const File> open(const std::string& path, const std::function<void()>& pause = [] {});

  // pread until `count` bytes have come: short reads are continued, EINTR is retried, any other error and an
  // early end of the file throw Error{read} with the offset.
  void read(uint64_t offset, void* destination, size_t count) const override;

  void read_on(bool wanted) const override;

  // See Note [Changed files] in change_watch.cpp. One system call.
  void require_unchanged(uint64_t offset) const override;

  // The file's first bytes, where comparing them later is of use.
  void remember_start(std::string_view bytes) const override;

  const std::string& path() const override { return path_; }
  uint64_t size() const override { return size_; }

  // The descriptor, for as long as the lease lives. Not to be held for longer than one system call takes: it is closed
  // for others between two of them. Throws Error{read} where the file had been closed, and cannot be opened again or is
  // another one now.
  open_files::Lease descriptor() const;

  // Whether a system call on it may wait for a server, or a program in user space, or for the file to be opened again:
  // not while others wait for this thread (Python's GIL). Two loads, no system call.
  bool may_wait() const { return watch_.doubts_times() || kept_.is_closed(); }

  uint64_t device() const { return device_; }            // number of the file system's device (st_dev)
  uint64_t file_system() const { return file_system_; }  // number of its type, as in linux/magic.h; 0: unknown

  // Of page_cache/residency: the ways of asking what is cached that were refused here, and are not tried again for
  // every range.
  std::atomic<uint8_t>& refusals() const { return refusals_; }

 private:
  File(std::string path, UniqueFd fd, const struct stat& status, uint64_t file_system);

  std::string path_;
  uint64_t size_;
  uint64_t device_;
  uint64_t file_system_;
  ChangeWatch watch_;
  mutable open_files::Kept kept_;
  mutable std::atomic<uint8_t> refusals_{0};
  mutable std::atomic<bool> reads_on_{true};
};

}  // namespace weightload
