#pragma once
#include <sys/stat.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "file/file_stamp.h"

namespace weightload {

// Notices that an open file is no longer what it was when it was opened. See Note [Changed files] in the source.
class ChangeWatch {
 public:
  // `file_system` is statfs's number of its type; 0 where that is not known.
  ChangeWatch(const struct stat& status, uint64_t file_system);

  // Whether the file system's times may mean nothing, so that it makes sense to remember_start().
  bool doubts_times() const { return doubts_; }

  // The file's first bytes, to be compared later. Before other threads know of the file.
  void remember_start(std::string_view bytes) const;

  // Throws Error{read}. One system call, where times can be relied on. `fd` is the file's; `path` and `offset` serve
  // the message.
  void require_unchanged(int fd, const std::string& path, uint64_t offset) const;

  // The same of a file that was opened once more by its name, and may be another one altogether.
  void require_same(int fd, const std::string& path, uint64_t offset) const;

 private:
  bool start_is_due() const;
  size_t digest_of_start(int fd, const std::string& path) const;
  void require_same_start(int fd, const std::string& path, uint64_t offset) const;
  void watch(int fd, const AskedStamp& now, const std::string& path, uint64_t offset) const;
  [[noreturn]] void fail(const FileStamp& now, const std::string& path, uint64_t offset) const;

  const AskedStamp opened_;
  const bool doubts_;      // whether times are those of a server, or of a program
  const bool user_space_;  // a program's; some do not say what they are
  mutable std::atomic<Times> times_{Times::tell};
  mutable size_t start_bytes_ = 0, start_digest_ = 0;
  mutable std::atomic<int64_t> start_due_{INT64_MAX};  // when to compare the start next, in ns of the steady clock
};

}  // namespace weightload
