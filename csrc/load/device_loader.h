#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "device/device.h"
#include "load/loader.h"
#include "memory/pinned_ring.h"
#include "plan/slot_plan.h"

namespace weightload {

// Slots that a load takes in place of its ring's.
struct OtherSlots {
  size_t slots = 0;  // at most
  uint64_t slot_bytes = 0;
};

struct DeviceLoaderOptions {
  unsigned threads = 2;
  unsigned threads_at_first = 0;        // and more only as long as they bring more; 0: all at once
  uint64_t slot_bytes = 8ull << 20;     // of the ring; a multiple of kDirectAlignment
  std::optional<OtherSlots> cold;       // where what is to be read does not look to be in the page cache
  uint64_t block_bytes = 128ull << 20;  // see LayoutOptions::block_bytes

  // How far, in bytes, reading may run ahead of the consumer: bounds the device memory that no tensor owns yet. Not
  // looked at where ranks share the reading.
  uint64_t window_bytes = 128ull << 20;
  ReadMode read = ReadMode::automatic;

  // Called now and then where the consumer has to do the threads' work; may throw.
  Look pause = no_look;
};

// A tensor on the device, which the calling thread's current stream may use at once.
struct DeviceTensor : LoadedTensor {
  DeviceBlockRef block;
  uint64_t block_offset = 0;
};

// What the threads of a load did beyond reading, in nanoseconds of all threads together, and in bytes.
struct DeviceLoadStats {
  uint64_t copy_ns = 0, allocate_ns = 0;
  uint64_t copies = 0, slots_filled = 0, blocks = 0, block_bytes = 0;
  PinnedRing::Stats ring;
};

// Yields the selected tensors of some files in order, on an accelerator: threads read into slots of the pinned ring and
// queue the slots' copies into blocks on the device's side stream, a block or two ahead of the consumer.
//
// A tensor is handed out when all copies of its block have been queued, not when they are done: the consumer's current
// stream waits for them, the host does not. An error of a reading thread is thrown at the first tensor of a block that
// it kept from being complete.
class DeviceLoader final : public Loader {
 public:
  // `selection` as for SelectedTensors. `places`, if not empty, has an element for each tensor in order: the memory to
  // load it into (the whole of the block), or null for memory of the loader's making. `exchange`, if not null, is an
  // agreement with other ranks to share the reading; places are not supported then.
  DeviceLoader(std::shared_ptr<Device> device, std::shared_ptr<PinnedRing> ring, CheckpointFiles files,
               const std::vector<std::vector<uint32_t>>& selection, std::vector<DeviceBlockRef> places,
               std::shared_ptr<GroupExchange> exchange, const DeviceLoaderOptions& options,
               const WantedParts& parts = {});
  ~DeviceLoader();

  // As HostLoader's. Tensors read in place are complete, for the stream that is current then, once `end` was returned.
  Step next(DeviceTensor& tensor, std::chrono::milliseconds patience);
  void interrupt() noexcept;
  void close() noexcept;

  DeviceLoadStats stats() const;

  // True once, when page-locking has failed. The consumer's call.
  bool found_pageable();

 private:
  struct BlockState {
    // Both guarded by `allocating` until the block's tasks are done.
    DeviceBlockRef memory;
    bool in_allocation = false;  // a thread is at it

    bool in_place = false;                // the caller's memory
    bool awaited = false;                 // handed to the consumer
    std::atomic<uint32_t> unfinished{0};  // tasks that have yet to queue a copy into it
  };

  struct Blocks {
    explicit Blocks(size_t count) : states(count) {}
    std::vector<BlockState> states;
    DeviceBlockRef empty;  // of no bytes, for the consumer's empty tensors
    std::mutex allocating;
    std::condition_variable allocated;  // a thread is no longer at it
  };

  void plan(std::vector<DeviceBlockRef> places, const DeviceLoaderOptions& options);
  bool looks_cold(const DeviceLoaderOptions& options) const;
  void start_reading(const DeviceLoaderOptions& options);
  void work(size_t task, const Look& look);
  void fill_slot(const SlotTask& task, const HostSlot& slot, const Look& look);
  DeviceBlock& block(uint32_t block);
  void allocate(uint32_t block, std::unique_lock<std::mutex>& lock);
  void allocate_ahead(uint32_t block);
  void mark_blocks(const SlotTask& task);
  bool prepare(uint32_t block, std::chrono::milliseconds patience, Payload& payload);
  bool await(uint32_t block, std::chrono::milliseconds patience);
  void await_places();
  DeviceBlockRef empty_block();

  const std::shared_ptr<Device> device_;
  const std::shared_ptr<PinnedRing> ring_;
  uint64_t block_bytes_ = 0;  // as options
  uint64_t slot_bytes_ = 0;   // that a slot carries at most: see PinnedRing::room
  SlotPlan slots_;
  ForkOwned<Blocks> blocks_;
  std::atomic<uint64_t> copy_ns_{0}, allocate_ns_{0};
  bool pageable_found_ = false;
  bool places_awaited_ = true;  // false while the caller's memory may be written
};

}  // namespace weightload
