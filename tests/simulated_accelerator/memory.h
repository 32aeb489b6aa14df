#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "streams.h"

namespace simulated {

// A piece of device memory. Its address is mapped without access rights, so that a host that reads or writes it is
// caught by the processor; streams reach the same bytes through shadow().
struct DeviceChunk {
  int device;
  uint64_t offset;  // in the device's arena
  size_t size;
  int64_t owner;              // the stream it was allocated on
  std::vector<int64_t> uses;  // other streams that record_stream named
};

void* device_address(const DeviceChunk& chunk);
char* shadow(const void* device_address);  // throws for addresses that are no device memory
int device_of(const void* address);        // -1 for host memory

// As torch's caching allocator for CUDA: memory that was freed goes to the next who asks on the same stream, at once,
// because that stream's work comes in order; with record_stream, when the named streams have passed the moment of the
// free. Fresh and freed memory is poisoned, in the order of the owner stream. Throws std::bad_alloc above the limit.
DeviceChunk* allocate_device(int device, int64_t stream, size_t size);
void free_device(DeviceChunk* chunk);
void record_use(DeviceChunk* chunk, int64_t stream);

void limit_device_memory(uint64_t bytes);
uint64_t live_bytes(int device);
uint64_t peak_bytes(int device);
void reset_peak(int device);
void empty_cache();  // synchronizes; forgets freed memory where nothing is live

// Page-locked host memory, cached as torch caches it: reused when the copies out of it are done, and poisoned then.
struct PinnedChunk {
  char* data;
  size_t size;
  std::vector<MomentRef> copies;  // that read or write it
};
PinnedChunk* allocate_pinned(size_t size);  // throws std::bad_alloc after fail_pinned
void free_pinned(PinnedChunk* chunk);
PinnedChunk* pinned_chunk(const void* address);  // null for other memory
void record_copy(PinnedChunk* chunk, MomentRef moment);
void fail_pinned_after(int64_t allocations);  // -1: never
void shift_pinned(size_t bytes);              // fresh chunks begin so many bytes behind a page, as malloc's may
uint64_t pinned_bytes();                      // in use
uint64_t pinned_made();                       // chunks ever made; the others were reused

}  // namespace simulated
