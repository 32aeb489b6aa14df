#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>

namespace simulated {

// Device memory. Its addresses are reserved without access rights: a host that follows one is stopped by the
// processor. The streams reach the bytes at another address, a fixed distance away.
//
// Allocations are whole pages, so that giving one back touches no neighbour. Addresses are handed out again as late as
// possible.

constexpr int kDevices = 4;  // that there can be
constexpr size_t kPage = 4096;
constexpr size_t kGranule = size_t{2} << 20;  // of addresses, and of what the driver's memory is made of

struct Allocation {
  uintptr_t begin = 0;
  size_t bytes = 0;
  int device = 0;
};

// The device whose address this is, or -1.
int device_of(const void* pointer);

// Where a stream reaches it; any other address is its own.
char* reach(const void* pointer);

// Addresses without memory; null when there are none left.
void* reserve_addresses(int device, size_t bytes);
void release_addresses(void* pointer, size_t bytes);

// Memory at reserved addresses; false: the device's limit is reached. `descriptor` of a memory file, or -1 for fresh
// memory. Counted against the device's limit when fresh.
bool commit(void* pointer, size_t bytes, int descriptor);
void decommit(void* pointer, size_t bytes, bool counted);

// Memory with addresses.
void* allocate(int device, size_t bytes);
std::optional<Allocation> release(void* pointer);

// The allocation that the bytes lie in, all of them.
std::optional<Allocation> allocation_of(const void* pointer, size_t bytes);
// What is mapped by the driver's calls counts as allocated, too.
void note_allocation(void* pointer, size_t bytes);
void drop_allocation(void* pointer);

// Counted against the limit: false when there is not so much left.
bool take_memory(int device, size_t bytes);
void give_memory(int device, size_t bytes);

size_t used_memory(int device);
size_t peak_memory(int device);
void reset_peak(int device);
size_t total_memory(int device);
void limit_memory(int device, size_t bytes);

}  // namespace simulated
