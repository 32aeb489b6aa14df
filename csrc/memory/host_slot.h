#pragma once
#include <cstddef>

namespace weightload {

// A buffer that threads read files into and an accelerator copies out of, later and by itself.
class HostSlot {
 public:
  virtual ~HostSlot() = default;
  HostSlot(const HostSlot&) = delete;
  HostSlot& operator=(const HostSlot&) = delete;

  char* data() const { return data_; }  // aligned to a page at least
  size_t size() const { return size_; }
  bool pinned() const { return pinned_; }

  // Whether the copies out of it, as of the last Device::mark_slot, are done. Neither waits nor throws.
  virtual bool copies_done() = 0;

  // Waits for them. Throws what the device says when it has failed.
  virtual void wait_for_copies() = 0;

 protected:
  HostSlot() = default;
  char* data_ = nullptr;
  size_t size_ = 0;
  bool pinned_ = false;
};

}  // namespace weightload
