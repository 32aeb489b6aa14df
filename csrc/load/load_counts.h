#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "base/stopwatch.h"
#include "file/file_counts.h"

namespace weightload {

// What a load counts while it runs, cheap enough to be always on: the clock is read twice a task and twice a wait,
// never for a tensor that is there. Any thread may read the counts at any time.
struct LoadCounts {
  using Clock = std::chrono::steady_clock;

  explicit LoadCounts(size_t number_of_files) : files(number_of_files) {}

  std::vector<FileCounts> files;

  // Of the consumer's thread: waiting for this rank's threads, and in all of what ranks do together. The latter
  // includes such waits, as a block is waited for before it travels.
  std::atomic<uint64_t> wait_ns{0};
  std::atomic<uint64_t> shared_ns{0};

  // The tensors that the consumer has got. Written by its thread alone.
  void deliver(uint64_t bytes) {
    tensors.store(tensors.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    tensor_bytes.store(tensor_bytes.load(std::memory_order_relaxed) + bytes, std::memory_order_relaxed);
  }
  std::atomic<uint64_t> tensors{0}, tensor_bytes{0};

  // Reading threads that were started. Written once, before the load is anyone else's.
  size_t threads = 0;

  const Clock::time_point begin = Clock::now();

  // The loader is made: its plan, its mappings and its threads.
  void made() noexcept { made_ns.store(since_begin()); }
  std::atomic<int64_t> made_ns{0};

  // When the first read began and the last one ended, since `begin`; 0 before.
  std::atomic<int64_t> first_read_ns{0}, last_read_ns{0};

  // A task's bytes, all of which are wanted, have been read.
  void was_read(uint32_t file, uint64_t wanted) { files[file].wanted_bytes += wanted; }

  // The time of one read, for its file and for the load.
  class Read {
   public:
    Read(LoadCounts& counts, uint32_t file) : counts_(counts), watch_(counts.files[file].read_ns) {
      int64_t none = 0;
      counts_.first_read_ns.compare_exchange_strong(none, counts_.since_begin());
    }
    ~Read() {
      const int64_t now = counts_.since_begin();
      int64_t latest = counts_.last_read_ns;
      while (latest < now && !counts_.last_read_ns.compare_exchange_weak(latest, now)) {
      }
    }
    Read(const Read&) = delete;
    Read& operator=(const Read&) = delete;

   private:
    LoadCounts& counts_;
    Stopwatch watch_;
  };

  // The load has ended. Only the first call counts.
  void end() noexcept {
    int64_t running = 0;
    ended_ns_.compare_exchange_strong(running, since_begin());
  }
  bool ended() const { return ended_ns_ != 0; }

  // From the begin to the end, or until now.
  uint64_t lasted_ns() const {
    const int64_t ended = ended_ns_;
    return static_cast<uint64_t>(ended != 0 ? ended : since_begin());
  }

 private:
  int64_t since_begin() const { return std::chrono::nanoseconds(Clock::now() - begin).count(); }

  std::atomic<int64_t> ended_ns_{0};
};

}  // namespace weightload
