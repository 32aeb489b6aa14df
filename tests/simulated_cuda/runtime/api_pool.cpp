// cudaMallocAsync and memory pools. Memory that a stream gave back goes to the next who asks on that stream, at once;
// to others when the host knows that the stream has come so far.
#include <cuda_runtime_api.h>

#include <list>
#include <map>
#include <mutex>

#include "arena.h"
#include "copy.h"
#include "device.h"
#include "errors.h"
#include "stream.h"

namespace simulated {
namespace {

constexpr int kHandedOut = 0xCD, kGivenBack = 0xDD;

struct Freed {
  void* pointer;
  size_t bytes;
  StreamRef stream;
  MomentRef moment;
};

struct Pool {
  int device;
  std::list<Freed> freed;
  uint64_t threshold = 0;
  uint64_t used = 0, used_high = 0, reserved_high = 0;
};

std::mutex mutex;
Pool* pool_of(int device) {
  static Pool* const pools[kDevices] = {new Pool{0, {}}, new Pool{1, {}}, new Pool{2, {}}, new Pool{3, {}}};
  return pools[device];
}
Pool* pool_of(cudaMemPool_t handle) { return reinterpret_cast<Pool*>(handle); }

void drop(const Freed& freed) {
  {
    std::lock_guard<std::mutex> lock(order_lock());
    checker().forget(reinterpret_cast<uintptr_t>(freed.pointer), freed.bytes);
  }
  release(freed.pointer);
}

uint64_t reserved(const Pool& pool) {
  uint64_t bytes = pool.used;
  for (const Freed& freed : pool.freed) bytes += freed.bytes;
  return bytes;
}

// With the pools locked: gives memory that no stream uses back to the device, down to so many bytes.
void trim(Pool& pool, uint64_t keep) {
  for (auto it = pool.freed.begin(); it != pool.freed.end() && reserved(pool) > keep;) {
    if (!it->moment->reached()) {
      ++it;
      continue;
    }
    host_query(*it->moment);
    drop(*it);
    it = pool.freed.erase(it);
  }
}

void* take(Pool& pool, size_t bytes, const StreamRef& stream) {
  std::lock_guard<std::mutex> lock(mutex);
  for (auto it = pool.freed.begin(); it != pool.freed.end(); ++it) {
    if (it->bytes != bytes || (it->stream != stream && !host_query(*it->moment))) continue;
    void* const pointer = it->pointer;
    pool.freed.erase(it);
    return pointer;
  }
  if (void* const fresh = allocate(pool.device, bytes)) return fresh;
  for (const Freed& freed : pool.freed) host_wait(*freed.moment);
  trim(pool, 0);
  return allocate(pool.device, bytes);
}

}  // namespace
}  // namespace simulated

using namespace simulated;

extern "C" {

cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t handle) {
  USE_DEVICE();
  const StreamRef stream = find_stream(handle);
  if (!stream) return finish(cudaErrorInvalidResourceHandle);
  bytes = (bytes + kPage - 1) / kPage * kPage;
  Pool& pool = *pool_of(stream->device);
  *pointer = take(pool, bytes, stream);
  if (*pointer == nullptr) return finish(cudaErrorMemoryAllocation);
  {
    std::lock_guard<std::mutex> lock(mutex);
    pool.used += bytes;
    pool.used_high = std::max(pool.used_high, pool.used);
    pool.reserved_high = std::max(pool.reserved_high, reserved(pool));
  }
  return finish(set(*pointer, kHandedOut, bytes, stream, "poison of memory handed out"));
}

cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t bytes, cudaMemPool_t, cudaStream_t stream) {
  return cudaMallocAsync(pointer, bytes, stream);
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t handle) {
  USE_DEVICE();
  if (pointer == nullptr) return cudaSuccess;
  const StreamRef stream = find_stream(handle);
  const auto found = allocation_of(pointer, 1);
  if (!stream || !found || found->begin != reinterpret_cast<uintptr_t>(pointer)) return finish(cudaErrorInvalidValue);
  if (const cudaError_t error = set(pointer, kGivenBack, found->bytes, stream, "poison of memory given back");
      error != cudaSuccess) {
    return finish(error);
  }
  const MomentRef moment = mark(stream);
  std::lock_guard<std::mutex> lock(mutex);
  Pool& pool = *pool_of(found->device);
  pool.used -= found->bytes;
  pool.freed.push_back({pointer, found->bytes, stream, moment});
  if (pool.threshold != UINT64_MAX) trim(pool, pool.threshold);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  if (device < 0 || device >= device_count()) return finish(cudaErrorInvalidDevice);
  *pool = reinterpret_cast<cudaMemPool_t>(pool_of(device));
  return cudaSuccess;
}

cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int device) { return cudaDeviceGetDefaultMemPool(pool, device); }

cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t handle, size_t keep) {
  std::lock_guard<std::mutex> lock(mutex);
  trim(*pool_of(handle), keep);
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t handle, cudaMemPoolAttr attribute, void* value) {
  std::lock_guard<std::mutex> lock(mutex);
  Pool& pool = *pool_of(handle);
  switch (attribute) {
    case cudaMemPoolAttrReleaseThreshold: pool.threshold = *static_cast<uint64_t*>(value); break;
    case cudaMemPoolAttrUsedMemHigh: pool.used_high = pool.used; break;
    case cudaMemPoolAttrReservedMemHigh: pool.reserved_high = reserved(pool); break;
    default: break;  // how memory may be reused
  }
  return cudaSuccess;
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t handle, cudaMemPoolAttr attribute, void* value) {
  std::lock_guard<std::mutex> lock(mutex);
  const Pool& pool = *pool_of(handle);
  switch (attribute) {
    case cudaMemPoolAttrReleaseThreshold: *static_cast<uint64_t*>(value) = pool.threshold; break;
    case cudaMemPoolAttrUsedMemCurrent: *static_cast<uint64_t*>(value) = pool.used; break;
    case cudaMemPoolAttrUsedMemHigh: *static_cast<uint64_t*>(value) = pool.used_high; break;
    case cudaMemPoolAttrReservedMemCurrent: *static_cast<uint64_t*>(value) = reserved(pool); break;
    case cudaMemPoolAttrReservedMemHigh: *static_cast<uint64_t*>(value) = pool.reserved_high; break;
    default: *static_cast<int*>(value) = 0; break;
  }
  return cudaSuccess;
}
}
