#pragma once
#include <cstdint>
#include <functional>
#include <memory>

#include "memory/host_slot.h"

namespace weightload {

// Memory on an accelerator that tensors share. Whoever was handed a tensor of it holds the memory by torch's count.
class DeviceBlock {
 public:
  virtual ~DeviceBlock() = default;
};

using DeviceBlockRef = std::shared_ptr<DeviceBlock>;

// An accelerator as a load sees it: memory, one side stream for the copies, and events between that stream, the host
// and the streams of the consumer; where ranks share the reading, a second side stream for the collectives. The host
// waits for the device where the ring is exhausted, and nowhere else.
//
// Note [Three orders]
// 1. Write after use. A fresh block may have been freed a moment ago by someone whose kernels still read it; torch's
//    caching allocator allows that, because it hands memory out again on the same stream only. The side stream is
//    another one: it waits for what the owner stream has queued before its first write.
// 2. Use after write. The consumer's current stream waits for the block's event, which lies behind its last copy.
// 3. Reuse after read. A slot is filled again when its event has passed, which lies behind its last copy. A block that
//    dies before the consumer's stream was made to wait for it is marked as used by the side stream; so is one that is
//    consumed on another stream than the one that owns it.
// A collective lies between 1 and 2: the collective stream waits for the block's event, and moves it behind itself.
//
// Thread safety: everything may be called by several threads at once, except that one block's calls are ordered by the
// caller: copies, then mark_block, then await_block.
class Device {
 public:
  virtual ~Device() = default;

  // Null or a throw when there is no memory of that kind.
  virtual std::unique_ptr<HostSlot> allocate_slot(size_t bytes, bool pinned) = 0;

  // A block whose memory belongs to the stream that was the caller's current one when the Device was made; the side
  // stream has been told to wait for it. Throws Error{device_memory}.
  virtual DeviceBlockRef allocate_block(uint64_t bytes) = 0;

  // Queues a copy on the side stream and returns.
  virtual void copy(HostSlot& slot, uint64_t slot_offset, DeviceBlock& block, uint64_t block_offset,
                    uint64_t bytes) = 0;

  // After a slot's last copy: HostSlot::copies_done() tells of everything queued so far.
  virtual void mark_slot(HostSlot& slot) = 0;

  // After a block's last copy.
  virtual void mark_block(DeviceBlock& block) = 0;

  // Makes the calling thread's current stream wait for a marked block, and the memory for that stream.
  virtual void await_block(DeviceBlock& block) = 0;

  // Makes the calling thread's current stream wait for everything queued so far.
  virtual void await_all() = 0;

  // Makes the collective stream wait for a marked block.
  virtual void behind_copies(DeviceBlock& block) = 0;

  // Calls `issue` with the collective stream as the thread's current one.
  virtual void on_collective_stream(const std::function<void()>& issue) = 0;

  // After a block's collective: await_block() then waits for that.
  virtual void mark_shared(DeviceBlock& block) = 0;

  // The block may be gone before its copies and its collective are done: nobody was handed a tensor of it.
  virtual void abandon(DeviceBlock& block) noexcept = 0;
};

}  // namespace weightload
