#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "bindings/gil.h"
#include "device/accelerator.h"
#include "load/device_loader.h"
#include "memory/pinned_ring.h"

namespace weightload {

// An accelerator and its pinned ring, which starts to fill at once.
struct DeviceTarget {
  DeviceTarget(const std::string& name, size_t slots, uint64_t slot_bytes, size_t enough,
               std::optional<OtherSlots> cold)
      : slot_bytes(slot_bytes), cold(cold) {
    device = make_accelerator(c10::Device(name));
    const auto allocate = [device = device, slot_bytes](bool pinned) {
      return device->allocate_slot(slot_bytes, pinned);
    };
    ring = PinnedRing::make(slots, allocate, enough);
  }

  // Both wait for a thread that may be in the driver.
  ~DeviceTarget() {
    const ReleaseGil release(AtExit::go_on);
    ring.reset();
    device.reset();
  }
  void close() { ring->close(); }

  uint64_t slot_bytes;
  std::optional<OtherSlots> cold;
  std::shared_ptr<Device> device;
  std::shared_ptr<PinnedRing> ring;
};

}  // namespace weightload
