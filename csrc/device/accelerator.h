#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <memory>

#include "device/device.h"

namespace weightload {

// Any accelerator that torch knows (CUDA, ROCm, or a backend registered as PrivateUse1), through torch's
// device-generic interface: its caching allocators, its streams and events, Tensor::copy_.
//
// The calling thread's current stream on that device becomes the owner of the blocks' memory; the side streams, of
// torch's pool, wait for what it has queued so far. Throws c10::Error.
std::shared_ptr<Device> make_accelerator(c10::Device device);

// The memory of a contiguous tensor on the device as a block, to load into.
DeviceBlockRef adopt_tensor(const at::Tensor& tensor);

// A block's memory as a one-dimensional uint8 tensor.
const at::Tensor& block_bytes(const DeviceBlock& block);

// Page-locked host memory for copies from and to the device, as a one-dimensional uint8 tensor. Throws c10::Error.
at::Tensor pinned_bytes(c10::Device device, uint64_t bytes);

}  // namespace weightload
