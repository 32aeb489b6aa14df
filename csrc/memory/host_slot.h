#pragma once
#include <cstddef>
#include <cstdint>

#include "base/byte_range.h"

namespace weightload {

// A buffer that threads read files into and an accelerator copies out of, later and by itself.
class HostSlot {
 public:
  virtual ~HostSlot() = default;
  HostSlot(const HostSlot&) = delete;
  HostSlot& operator=(const HostSlot&) = delete;

  // Page-locked memory begins at a page, except where torch locks what malloc gave it (pinned_use_cuda_host_register):
  // then 16 bytes behind one.
  char* data() const { return data_; }
  size_t size() const { return size_; }
  bool pinned() const { return pinned_; }

  // Bytes before the first place that direct reads may write to: below kDirectAlignment.
  size_t before_aligned() const {
    const auto at = reinterpret_cast<uintptr_t>(data_);
    return static_cast<size_t>(round_up(at, kDirectAlignment) - at);
  }

  // Where `bytes` bytes of it are best put, from data(): for direct reads if there is room for that.
  size_t place_for(size_t bytes) const { return before_aligned() + bytes <= size_ ? before_aligned() : 0; }

  // Whether the copies out of it, as of the last Device::mark_slot, are done. Does not wait. Throws what the device
  // says when it has failed.
  virtual bool copies_done() = 0;

 protected:
  HostSlot() = default;
  char* data_ = nullptr;
  size_t size_ = 0;
  bool pinned_ = false;
};

}  // namespace weightload
