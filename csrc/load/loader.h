#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "base/delete_unless_forked.h"
#include "base/fork_generation.h"
#include "base/look.h"
#include "checkpoint/selected_tensors.h"
#include "group/shared_blocks.h"
#include "load/load_counts.h"
#include "memory/host_memory.h"
#include "page_cache/cache_filler.h"
#include "page_cache/load_mappings.h"
#include "plan/layout.h"
#include "read/range_reader.h"
#include "threads/ordered_pool.h"
#include "threads/pace.h"

namespace weightload {

// A tensor that is handed out. The pointers into the header are valid while the loader (or its files) lives.
struct LoadedTensor {
  const CheckpointFile* file = nullptr;
  const TensorInfo* info = nullptr;
  bool in_place = false;  // read into memory of the caller's: that is all there is of it
};

// What loads of all kinds share: the selected tensors of some files in order, threads that bring the bytes in ahead of
// the consumer, and an end that may come at any time. A kind says what the threads do, and has next() and close().
class Loader {
 public:
  enum class Step : uint8_t { tensor, not_ready, end };

  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  // What keeps this rank from taking part any longer. The ranks that share the load raise it when it is closed.
  void give_reason(const Error& error) { shared_.give_reason(error); }

  // True in a child forked after construction: it has none of the threads and can only let go.
  bool forked() const { return fork_generation_ != fork_generation(); }

  // Whether the next next() communicates with other ranks.
  bool needs_others() const;

  const LoadCounts& counts() const { return counts_; }

  uint64_t total_bytes() const { return selected_.total_bytes(); }
  size_t tensor_count() const { return selected_.size(); }

 protected:
  // `readers`: threads that may read at once.
  Loader(CheckpointFiles files, const std::vector<std::vector<uint32_t>>& selection, const WantedParts& parts,
         std::shared_ptr<GroupExchange> exchange, unsigned readers);
  ~Loader() = default;  // of a kind that has called end(): its threads use what is the kind's

  // By file; null where it is not mapped.
  std::vector<char*> maps() const;

  void open_reader(uint32_t file, ReadMode mode, ReadInto memory);

  // Tells the taps of files which they will not be told of. Before any reader is open.
  void leave_taps();

  // Starts the threads on the tasks of a plan. The last that a kind's constructor does: should something throw after
  // it, what is the kind's would be gone before the threads are.
  template <typename Task>
  void start(const std::vector<Task>& tasks, Threads threads, uint64_t window_bytes, OrderedPool::Work work,
             const Look& pause) {
    std::vector<uint64_t> ends;
    ends.reserve(tasks.size());
    uint64_t total = 0;
    for (size_t t = 0; t < tasks.size(); ++t) {
      ends.push_back(total += tasks[t].bytes.size());
      held_[tasks[t].file].last_task = t;
    }
    pool_.reset(new OrderedPool(std::move(ends), threads, window_bytes, std::move(work), pause));
    counts_.threads = pool_->thread_count();
  }

  // For next(): throws in a forked child.
  void require_process() const;

  // Waits for tasks 0 .. `task`: false when that takes longer than the patience, or the load is over. Throws what the
  // threads threw, with the tensor that it hit, from `first_tensor` on.
  bool await_task(size_t task, size_t first_tensor, std::chrono::milliseconds patience);

  // What next() returns where nothing has come.
  Step no_tensor() const { return interrupted_ ? Step::end : Step::not_ready; }

  // The next tensor is the consumer's: goes on to the one behind it.
  void hand_out(LoadedTensor& tensor);

  // Stops the threads, from any thread. Does not wait for them.
  void stop() noexcept;

  // Joins the threads, tells the other ranks and lets go of the files; after stop().
  void end() noexcept;

  void let_go_of_passed_files(uint32_t current_file);

  SharedBlocks shared_;  // before what may fail to be made: the others are told
  SelectedTensors selected_;
  LoadCounts counts_;
  Layout layout_;
  LoadMappings mappings_;
  CacheFiller filler_{mappings_};
  const ForkOwned<Pace> pace_;
  Pace unpaced_{Pace::Unpaced{}};  // of what is no file

  // What a load holds of a file until the threads and the consumer have left it behind.
  struct HeldFile {
    HostMemoryRef map;                    // none where it is not mapped
    std::unique_ptr<RangeReader> reader;  // none where nothing is read by it
    bool is_left = false;                 // its tap is not told
    size_t last_task = 0;                 // the last that reads it
  };
  std::vector<HeldFile> held_;    // by file
  uint32_t first_held_file_ = 0;  // of files before this one nothing is held any more

  size_t next_ = 0;  // the tensor whose turn it is
  std::atomic<bool> interrupted_{false};
  const uint32_t fork_generation_ = fork_generation();
  ForkOwned<OrderedPool> pool_;  // none where nothing is to be read; last: its threads use everything above
};

}  // namespace weightload
