#pragma once
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device/device.h"
#include "memory/host_memory.h"

namespace weightload {

// A block's memory, of the host or of an accelerator.
struct Payload {
  HostMemoryRef host;
  DeviceBlockRef device;
  uint64_t bytes = 0;
};

// The records of all ranks, one after the other.
using Records = std::vector<std::string>;

// A collective that has been issued.
class Pending {
 public:
  virtual ~Pending() = default;

  // Waits, at most `patience`, until the host may go on: until host memory is complete; for an accelerator's, until the
  // block is complete for whoever awaits it. Throws Error{group} when the communicator has failed, which includes the
  // group's timeout.
  virtual bool wait(std::chrono::milliseconds patience) = 0;

  // Of gather(), once wait() has returned true.
  virtual Records records() { return {}; }
};

// The ranks of a group, and the collectives a load needs, whole blocks at a time. Issuing does not wait for other
// ranks. One thread at a time; what is issued in the same order on every rank is matched.
class Collective {
 public:
  virtual ~Collective() = default;
  virtual uint32_t rank() const = 0;
  virtual uint32_t ranks() const = 0;

  // A record of every rank to every rank. Records have the same size on all.
  virtual std::unique_ptr<Pending> gather(const std::string& record) = 0;

  // Root's bytes to everyone, behind the block's copies.
  virtual std::unique_ptr<Pending> broadcast(const Payload& payload, uint32_t root) = 0;

  // Everyone's stripe to everyone, in place: rank r has bytes [r * stripe, (r + 1) * stripe), and the payload is
  // `ranks` stripes long. Behind the block's copies.
  virtual std::unique_ptr<Pending> all_gather(const Payload& payload) = 0;
};

}  // namespace weightload
