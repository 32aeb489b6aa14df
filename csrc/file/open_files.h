#pragma once
#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <optional>
#include <string>
#include <utility>

#include "base/unique_fd.h"

namespace weightload::open_files {

// A process has so many descriptors (`ulimit -n`), and a checkpoint may have more shards. So at most a share of them is
// kept, half of the soft limit, and the rest left to the program: beyond it, or where the system has no more, those
// files are closed that nobody reads just now and that were not used for longest. Who wants one of them again opens it
// by the name that it had when it was closed (see File::descriptor).

// open(2) for reading, close-on-exec and without waiting for a FIFO's writer: no descriptor and errno where it fails.
// Where there is no descriptor left, files that are not in use are closed first. Where another process has a lease on
// the file (Samba, an NFS server) it waits until that has let go, which the kernel sees to in 45 s by default. Calls
// `pause` after a signal, and now and then while it waits; it may throw.
UniqueFd open(const std::string& name, const std::function<void()>& pause);

class Kept;

// Use of a descriptor, which stays open meanwhile. Empty where the file has been closed.
class Lease {
 public:
  Lease() = default;
  Lease(Lease&& other) noexcept : kept_(std::exchange(other.kept_, nullptr)), fd_(other.fd_) {}
  Lease& operator=(Lease&&) = delete;
  ~Lease();

  explicit operator bool() const { return kept_ != nullptr; }
  int get() const { return fd_; }

 private:
  friend class Kept;
  Lease(Kept* kept, int fd) : kept_(kept), fd_(fd) {}

  Kept* kept_ = nullptr;
  int fd_ = -1;
};

// A descriptor that is kept until its room is needed. Many threads.
class Kept {
 public:
  explicit Kept(UniqueFd fd);
  ~Kept();
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;

  // Two atomic operations, no lock. Empty where it has been closed.
  Lease lease();

  // Whether it would have to be opened again just now.
  bool is_closed() const { return (state_.load(std::memory_order_relaxed) & kClosed) != 0; }

  // The name that the file had when it was closed, links resolved; empty where the system did not say.
  std::string name() const;

  // Takes a descriptor of the same file, unless another thread was faster.
  Lease put_back(UniqueFd fd);

 private:
  friend class Lease;
  friend struct Pool;

  static constexpr uint32_t kClosed = 1u << 31;

  UniqueFd close_if_idle();  // with the pool's mutex held

  std::atomic<uint32_t> state_{0};     // leases, and kClosed; that is set and cleared with the pool's mutex held
  std::atomic<bool> used_{true};       // since it was looked at last
  UniqueFd fd_;                        // written by who has set kClosed, or will clear it
  std::string name_;                   // guarded by the pool's mutex
  uint32_t generation_ = 0;            // of the pool whose list it is in
  std::list<Kept*>::iterator listed_;  // while it is open; guarded by the pool's mutex
};

// Room for one more descriptor that cannot be closed and opened again, if the share has it.
class Extra {
 public:
  static std::optional<Extra> take();
  Extra(Extra&& other) noexcept : generation_(other.generation_), held_(std::exchange(other.held_, false)) {}
  Extra& operator=(Extra&&) = delete;
  ~Extra();

 private:
  explicit Extra(uint32_t generation) : generation_(generation), held_(true) {}

  uint32_t generation_;
  bool held_;
};

// The soft limit of the process (`ulimit -n`), for messages.
uint64_t limit();

}  // namespace weightload::open_files
