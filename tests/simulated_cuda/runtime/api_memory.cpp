// Memory of devices and page-locked memory; copies.
#include <cuda_runtime_api.h>

#include "arena.h"
#include "capture.h"
#include "copy.h"
#include "device.h"
#include "errors.h"
#include "host_memory.h"
#include "report.h"
#include "stream.h"

using namespace simulated;

namespace {

// Page-locked memory that goes while a stream may still use it. A driver may wait here, or may not.
void give_back(uintptr_t begin, size_t bytes, const char* what) {
  std::string by;
  {
    std::lock_guard<std::mutex> lock(order_lock());
    by = checker().unsettled(begin, bytes, host_clock());
  }
  if (!by.empty()) {
    add_report(std::string(what) + ": page-locked memory is given back while it may be used by " + by);
    for (int d = 0; d < device_count(); ++d)
      if (has_context(d)) synchronize_device(d);
  }
  std::lock_guard<std::mutex> lock(order_lock());
  checker().forget(begin, bytes);
}

cudaError_t plain(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t handle, bool waits) {
  USE_DEVICE();
  if (waits) NOT_IN_CAPTURE();
  const StreamRef stream = find_stream(handle);
  if (!stream) return finish(cudaErrorInvalidResourceHandle);
  return finish(copy({to, from, bytes, 1, bytes, bytes, kind}, stream, waits));
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  USE_DEVICE();
  NOT_IN_CAPTURE();
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  *pointer = allocate(current_device(), bytes);
  return finish(*pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void* pointer) {
  USE_DEVICE();
  if (pointer == nullptr) return cudaSuccess;
  NOT_IN_CAPTURE();
  const int device = device_of(pointer);
  if (device < 0) return finish(cudaErrorInvalidValue);
  const auto found = allocation_of(pointer, 1);
  if (!found || found->begin != reinterpret_cast<uintptr_t>(pointer)) return finish(cudaErrorInvalidValue);
  // Waits for the device, as drivers do.
  for (int d = 0; d < device_count(); ++d)
    if (has_context(d)) synchronize_device(d);
  {
    std::lock_guard<std::mutex> lock(order_lock());
    checker().forget(found->begin, found->bytes);
  }
  release(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  USE_DEVICE();
  NOT_IN_CAPTURE();
  *pointer = bytes == 0 ? nullptr : allocate_locked(bytes);
  return finish(bytes == 0 || *pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }

cudaError_t cudaFreeHost(void* pointer) {
  USE_DEVICE();
  if (pointer == nullptr) return cudaSuccess;
  uintptr_t begin = 0;
  size_t bytes = 0;
  if (!locked_range(pointer, &begin, &bytes)) return finish(cudaErrorInvalidValue);
  give_back(begin, bytes, "cudaFreeHost");
  return finish(free_locked(pointer, &bytes) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  USE_DEVICE();
  NOT_IN_CAPTURE();
  if (pointer == nullptr || bytes == 0) return finish(cudaErrorInvalidValue);
  if (is_locked(pointer, 1)) return finish(cudaErrorHostMemoryAlreadyRegistered);
  return finish(register_locked(pointer, bytes) ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaHostUnregister(void* pointer) {
  USE_DEVICE();
  uintptr_t begin = 0;
  size_t bytes = 0;
  if (!locked_range(pointer, &begin, &bytes)) return finish(cudaErrorHostMemoryNotRegistered);
  give_back(begin, bytes, "cudaHostUnregister");
  return finish(unregister_locked(pointer, &bytes) ? cudaSuccess : cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaHostGetDevicePointer(void** there, void* here, unsigned) {
  USE_DEVICE();
  if (!is_locked(here, 1)) return finish(cudaErrorInvalidValue);
  *there = here;
  return cudaSuccess;
}

cudaError_t cudaHostGetFlags(unsigned* flags, void* pointer) {
  *flags = 0;
  return finish(is_locked(pointer, 1) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  *attributes = {};
  attributes->device = -2;
  void* const address = const_cast<void*>(pointer);
  if (device_of(pointer) >= 0 && allocation_of(pointer, 1)) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = device_of(pointer);
    attributes->devicePointer = address;
  } else if (is_locked(pointer, 1)) {
    attributes->type = cudaMemoryTypeHost;
    attributes->device = current_device();
    attributes->devicePointer = attributes->hostPointer = address;
  } else {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->hostPointer = address;
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return plain(to, from, bytes, kind, nullptr, true);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return plain(to, from, bytes, kind, stream, false);
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return plain(to, from, bytes, cudaMemcpyDeviceToDevice, stream, false);
}

cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t bytes) {
  return plain(to, from, bytes, cudaMemcpyDeviceToDevice, nullptr, true);
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t handle) {
  USE_DEVICE();
  const StreamRef stream = find_stream(handle);
  if (!stream) return finish(cudaErrorInvalidResourceHandle);
  return finish(copy({to, from, width, height, to_pitch, from_pitch, kind}, stream, false));
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t handle) {
  USE_DEVICE();
  const StreamRef stream = find_stream(handle);
  if (!stream) return finish(cudaErrorInvalidResourceHandle);
  return finish(set(to, value, bytes, stream, "memset"));
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  NOT_IN_CAPTURE();
  return cudaMemsetAsync(to, value, bytes, nullptr);
}
}
