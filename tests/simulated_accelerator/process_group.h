#pragma once
#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace simulated {

// A communicator for tensors of the device; `gloo` is its own, and carries the bytes.
c10::intrusive_ptr<c10d::Backend> make_group(const c10::intrusive_ptr<c10d::Backend>& gloo, int64_t timeout_ms);
void abort_groups();  // for the interpreter's exit: nothing waits for other ranks any more

}  // namespace simulated
