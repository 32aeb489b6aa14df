#pragma once
#include <cstddef>

namespace weightload {

// A buffer that threads read files into and an accelerator copies out of, later and by itself.
class HostSlot {
 public:
  virtual ~HostSlot() = default;
  HostSlot(const HostSlot&) = delete;
  HostSlot& operator=(const HostSlot&) = delete;

  // Aligned to a page, or direct reads into it may be refused: torch's allocator does so unless it was told to lock
  // memory of malloc's (pinned_use_cuda_host_register).
  char* data() const { return data_; }
  size_t size() const { return size_; }
  bool pinned() const { return pinned_; }

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
