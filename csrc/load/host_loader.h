#pragma once
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "load/loader.h"
#include "memory/backed_pages.h"
#include "memory/block_cache.h"
#include "memory/fresh_pages.h"
#include "memory/host_memory.h"
#include "page_cache/page_tables.h"
#include "plan/read_plan.h"

namespace weightload {

struct HostLoaderOptions {
  // Views of the mapped files, or private memory. Bytes in memory, and tensors that lie misaligned in their
  // file, always get private memory.
  bool map = true;

  // Whether a file that cannot be mapped is an error. If not its tensors get private memory: for those who copy them.
  // Views in a load with places can be written to only if this is true.
  bool must_map = true;

  // Of files in the page cache, and of those that are not all there: more than there are CPUs then, so that some wait
  // for the storage while others copy.
  unsigned threads = 2;
  unsigned cold_threads = 2;
  // Of those, and more only as long as they bring more; 0: all at once. See threads/widening.h.
  unsigned threads_at_first = 0;

  // How far, in bytes, reading may run ahead of the consumer. Bounds the private memory that no tensor owns
  // yet, and what an early exit has read in vain. Too small starves the threads: at least threads *
  // task_bytes.
  uint64_t window_bytes = 256ull << 20;
  uint64_t task_bytes = 8ull << 20;
  uint64_t block_bytes = 64ull << 20;

  // Of private memory and the caller's. What is not shared with other ranks may be read directly.
  ReadMode read = ReadMode::automatic;

  // Mapped files: false leaves the reading to page faults.
  bool read_ahead = true;

  // More files than this are not mapped, and their tensors get private memory: a process has 65,530 mappings
  // (vm.max_map_count), which its other memory needs, too.
  size_t most_maps = kMostMaps;

  // Called now and then where the consumer has to do the threads' work; may throw.
  Look pause = no_look;
};

// A tensor ready to be used. The memory lives as long as `memory` is held.
struct HostTensor : LoadedTensor {
  char* data = nullptr;  // null for an empty tensor
  HostMemoryRef memory;
};

// Yields the selected tensors of some files in order (files as given, tensors by offset), in host memory,
// while threads bring the bytes in ahead of the consumer.
//
// A mapped tensor is handed out when its pages are in the page cache and in the page tables, a private one when its
// bytes have been copied. An error of a reading thread is thrown at the first tensor that needs what it could not read.
class HostLoader final : public Loader {
 public:
  // `selection[f]` lists tensors of file f by their number in its header, ascending. Throws on names that
  // occur twice, and on files that cannot be mapped.
  // `places`, if not empty, has an element for each tensor in order: the memory to read it into, or none for memory of
  // the loader's choice, which is to be copied from only, and needs no file that can be mapped. `exchange`, if not
  // null, is an agreement with other ranks to share the reading; memory is then private, and places and parts are not
  // supported. `parts`: of which tensors only a part is wanted. One that is not contiguous in its file is private.
  HostLoader(CheckpointFiles files, const std::vector<std::vector<uint32_t>>& selection,
             std::vector<HostMemoryRef> places, std::shared_ptr<GroupExchange> exchange,
             const HostLoaderOptions& options, const WantedParts& parts = {});
  ~HostLoader();

  // The next tensor, if it comes within `patience`. Throws what the reading threads threw, and after fork()
  // in the child, which has none of the threads. One thread at a time.
  Step next(HostTensor& tensor, std::chrono::milliseconds patience);

  // Makes a next() that waits in another thread return not_ready soon, and no further reading start.
  void interrupt() noexcept { stop(); }

  // Stops and joins the threads and lets go of the files. Tensors handed out stay valid.
  void close() noexcept;

 private:
  struct Readiness {
    uint32_t last_task = 0;  // the tensor is complete when this task and all before it are done
    bool wait = true;        // false: nothing is read ahead
  };

  struct BlockState {
    HostMemoryRef memory;   // none of mapped blocks; allocated by the first thread that needs it
    bool in_place = false;  // the caller's memory
  };

  bool can_view(size_t tensor) const;
  void map_files(const std::vector<HostMemoryRef>& places, const HostLoaderOptions& options);
  void plan(std::vector<HostMemoryRef> places, const HostLoaderOptions& options);
  bool map_here();
  void find_tasks();
  void start_reading(const HostLoaderOptions& options);
  void work(size_t task, const Look& look);
  // Where a range of a file goes.
  struct Destination {
    HostMemory& memory;
    char* begin;
    bool huge;      // pages; single ones make large direct reads slow
    bool in_place;  // the caller's
  };

  void read_private(RangeReader& reader, ByteRange range, const Destination& to, const Look& look);
  void fault_in(const Destination& to, char* begin, uint64_t size, const Look& look);
  void read_buffered(RangeReader& reader, RangeReader::Attempt& attempt, uint64_t from, const Destination& to);
  bool may_pass_caches(const char* place, uint64_t size);
  HostMemoryRef allocate(uint64_t bytes);
  uint64_t read_bounced(RangeReader& reader, RangeReader::Attempt& attempt, const Destination& to);
  HostMemoryRef block_memory(uint32_t block);
  bool prepare(uint32_t block, std::chrono::milliseconds patience, Payload& payload);
  bool require_unchanged(std::chrono::milliseconds patience);

  std::vector<Readiness> readiness_;  // by tensor
  ReadPlan reads_;

  std::shared_ptr<BlockCache> block_cache_;
  std::mutex allocating_;           // guards the memory of blocks until their tasks are done
  std::vector<BlockState> blocks_;  // by block

  uint32_t unchanged_file_ = UINT32_MAX;  // the last mapped one that was found unchanged, and when
  std::chrono::steady_clock::time_point unchanged_at_;
  bool page_in_ = true;
  ReadMode read_;
  BackedPages backed_pages_;
  FreshPages fresh_pages_{backed_pages_};
  std::optional<PageTables> page_tables_;  // where mapped blocks are paged in
};

}  // namespace weightload
