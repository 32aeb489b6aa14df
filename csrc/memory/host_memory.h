#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace weightload {

// Host memory that tensors share: a mapped file or an anonymous block. Counted by itself, because a torch
// storage keeps one untyped pointer to what it must release, and there is one storage a tensor: an extra
// allocation for a shared_ptr each would show at twenty thousand tensors.
class HostMemory {
 public:
  virtual ~HostMemory() = default;
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  char* data() const { return data_; }
  size_t size() const { return size_; }

  // Brings in the pages of [begin, begin + size), to be written to next: faster than the faults of whoever writes, and
  // in the kind of pages that is cheaper.
  virtual void fault_in(char* /*begin*/, size_t /*size*/) {}

  // Whether it is, or will be, in huge pages. Single ones make large direct reads slow.
  virtual bool in_huge_pages() const { return true; }

  void retain() noexcept { references_.fetch_add(1, std::memory_order_relaxed); }
  void release() noexcept {
    if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

 protected:
  HostMemory() = default;
  char* data_ = nullptr;
  size_t size_ = 0;

 private:
  std::atomic<uint32_t> references_{1};
};

// Owner of one reference.
class HostMemoryRef {
 public:
  HostMemoryRef() = default;
  static HostMemoryRef adopt(HostMemory* memory) {
    HostMemoryRef ref;
    ref.memory_ = memory;
    return ref;
  }
  HostMemoryRef(const HostMemoryRef& other) : memory_(other.memory_) {
    if (memory_) memory_->retain();
  }
  HostMemoryRef(HostMemoryRef&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}
  HostMemoryRef& operator=(HostMemoryRef other) noexcept {
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~HostMemoryRef() {
    if (memory_) memory_->release();
  }

  HostMemory* get() const { return memory_; }
  HostMemory* operator->() const { return memory_; }
  explicit operator bool() const { return memory_ != nullptr; }

 private:
  HostMemory* memory_ = nullptr;
};

// Files that one load maps at most: a process has 65,530 mappings (vm.max_map_count).
inline constexpr size_t kMostMaps = 16384;

// Maps a whole regular file copy-on-write (MAP_PRIVATE, readable and writable): writes stay in this process
// and never reach the file. The descriptor may be closed afterwards. `path` serves the message. Throws Error{memory}
// where address space is short, else Error{read}.
//
// What the kernel does, and we cannot prevent: pages not yet written show later changes of the file, and
// touching a page beyond the end of a file that was truncated ends the process with SIGBUS.
//
// `Access::read`: what is mapped cannot be written to, and takes no memory of its own where all of a process's is
// locked.
enum class Access : uint8_t { read, write };
HostMemoryRef map_file(int fd, uint64_t size, const std::string& path, Access access = Access::write);

// Private memory, not initialised by us (the kernel's zeros), aligned to 64 bytes at least. Blocks of 2 MiB
// and more are aligned to and sized in huge pages and advise them: first touch then costs a fault per 2 MiB,
// not per 4 KiB, which is four to ten times faster to fill. Throws Error{memory}.
HostMemoryRef allocate_block(uint64_t size);

}  // namespace weightload
