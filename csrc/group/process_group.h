#pragma once
#include <c10/core/Device.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <memory>

#include "group/collective.h"

namespace weightload {

// A group of torch.distributed, used as it is: its backend, its communicator, its timeout. Ranks are the group's own
// (c10d's C++ interface counts them so; Python's counts global ones).
//
// `device` has the payload: null for host memory. Records travel between CPUs if the group has a backend for them, and
// otherwise through the accelerator. Throws Error{usage} when the group cannot move the payload's kind of memory.
std::unique_ptr<Collective> make_collective(c10::intrusive_ptr<c10d::ProcessGroup> group, c10::Device type,
                                            std::shared_ptr<Device> device);

}  // namespace weightload
