#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <shared_mutex>
#include <utility>

#include "base/byte_range.h"
#include "file/file.h"

namespace weightload {

// Mappings that a load's reading threads make for themselves. Of one range alone, not written to, and gone soon. So
// they take address space for a task a thread, locked pages are the page cache's own (mlockall), and nobody else has
// pages of them in hand. Many threads.
class LoadMappings {
 public:
  class Mapping {
   public:
    Mapping(Mapping&& other) noexcept
        : allowed_(std::move(other.allowed_)), pages_(other.pages_), begin_(std::exchange(other.begin_, nullptr)) {}
    Mapping& operator=(Mapping&&) = delete;
    ~Mapping();

    char* begin() const { return begin_; }  // of the first page that holds bytes of the range
    char* end() const { return begin_ + pages_.size(); }

    // Where a byte of the file is.
    char* at(uint64_t position) const { return begin_ + (position - pages_.begin); }

   private:
    friend LoadMappings;
    Mapping(std::shared_lock<std::shared_mutex> allowed, ByteRange pages, void* begin)
        : allowed_(std::move(allowed)), pages_(pages), begin_(static_cast<char*>(begin)) {}

    std::shared_lock<std::shared_mutex> allowed_;
    ByteRange pages_;
    char* begin_;
  };

  // Nothing on a file system that cannot map, or in a process that may not map more.
  std::optional<Mapping> map(const File& file, ByteRange range);

  // From now on nothing is mapped, and nothing is when it returns: the address space is needed for tensors. Not while
  // this thread has a mapping.
  void give_up();

 private:
  std::shared_mutex mapping_;
  std::atomic<bool> given_up_{false};
};

}  // namespace weightload
