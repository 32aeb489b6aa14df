#pragma once
#include <sys/stat.h>

#include <atomic>
#include <memory>
#include <string>

#include "base/unique_fd.h"
#include "io/byte_source.h"

namespace weightload {

// A regular file, opened once for reading. Everything later (header, residency, mapping, reads) goes through
// this descriptor, so a file that is replaced under its name keeps giving the bytes of the one that was
// opened.
class File final : public ByteSource {
 public:
  // Throws Error{open} with errno, or the header rule NotARegularFile for directories, devices, FIFOs and
  // sockets, which are not opened: opening a device may do something, and a FIFO waits for a writer.
  static std::shared_ptr<const File> open(const std::string& path);

  // pread until `count` bytes have come: short reads are continued, EINTR is retried, any other error and an
  // early end of the file throw Error{read} with the offset.
  void read(uint64_t offset, void* destination, size_t count) const override;

  void read_on(bool wanted) const override;

  // See Note [Changed files] in file.cpp. One system call.
  void require_unchanged(uint64_t offset) const override;

  const std::string& path() const override { return path_; }
  uint64_t size() const override { return size_; }
  int fd() const { return fd_.get(); }
  uint64_t device() const { return device_; }  // number of the file system's device (st_dev)

 private:
  File(std::string path, UniqueFd fd, const struct stat& status);

  std::string path_;
  UniqueFd fd_;
  uint64_t size_;
  uint64_t device_;
  struct timespec modified_;
  mutable std::atomic<bool> reads_on_{true};
};

}  // namespace weightload
