#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

namespace simulated {
namespace {

constexpr uint64_t kArenaBytes = 8ull << 30;  // address space; memory is taken as it is touched
constexpr size_t kGranule = 512;
constexpr int kFresh = 0xCD;
constexpr int kFreed = 0xDD;
constexpr int kPinned = 0xEE;

struct Free {
  uint64_t offset;
  size_t size;
  int64_t owner;
  std::vector<MomentRef> pending;  // empty, or all reached: it may be handed out
};

struct Arena {
  char* device = nullptr;  // no access
  char* shadow = nullptr;
  uint64_t used = 0;  // bytes ever carved off
  uint64_t live = 0, peak = 0;
  std::vector<Free> free;
};

std::mutex mutex;  // guards everything below
Arena arenas[kDevices];
uint64_t limit = kArenaBytes;
std::map<const char*, PinnedChunk*> pinned;  // all, by address
std::vector<PinnedChunk*> idle_pinned;
int64_t pinned_allocations_left = -1;
size_t pinned_shift = 0;
uint64_t pinned_live = 0;

Arena& arena(int device) {
  Arena& found = arenas[device];
  if (found.device) return found;
  const int fd = ::memfd_create("simulated accelerator", MFD_CLOEXEC);
  if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(kArenaBytes)) != 0) throw std::runtime_error("no memory file");
  void* device_view = ::mmap(nullptr, kArenaBytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  void* shadow_view = ::mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  ::close(fd);
  if (device_view == MAP_FAILED || shadow_view == MAP_FAILED) throw std::runtime_error("no address space");
  found.device = static_cast<char*>(device_view);
  found.shadow = static_cast<char*>(shadow_view);
  return found;
}

void poison(int device, int64_t stream_id, uint64_t offset, size_t size, int value) {
  char* const begin = arenas[device].shadow + offset;
  stream(device, stream_id).enqueue([begin, size, value] { std::memset(begin, value, size); });
}

bool is_free(const Free& candidate) {
  return std::all_of(candidate.pending.begin(), candidate.pending.end(),
                     [](const MomentRef& moment) { return moment->reached(); });
}

// The most recently freed piece of the stream that is large enough: what provokes reuse most.
bool take_free(Arena& from, int64_t owner, size_t size, Free& taken) {
  for (size_t i = from.free.size(); i-- > 0;) {
    Free& candidate = from.free[i];
    if (candidate.owner != owner || candidate.size < size || !is_free(candidate)) continue;
    taken = {candidate.offset, size, owner, {}};
    candidate.offset += size;
    candidate.size -= size;
    if (candidate.size == 0) from.free.erase(from.free.begin() + static_cast<std::ptrdiff_t>(i));
    return true;
  }
  return false;
}

size_t round_up(size_t size) { return (size + kGranule - 1) / kGranule * kGranule; }

}  // namespace

void* device_address(const DeviceChunk& chunk) { return arenas[chunk.device].device + chunk.offset; }

int device_of(const void* address) {
  const char* at = static_cast<const char*>(address);
  for (int device = 0; device < kDevices; ++device) {
    const Arena& one = arenas[device];
    if (one.device && at >= one.device && at < one.device + kArenaBytes) return device;
  }
  return -1;
}

char* shadow(const void* address) {
  const int device = device_of(address);
  if (device < 0) throw std::runtime_error("not an address of the simulated accelerator");
  return arenas[device].shadow + (static_cast<const char*>(address) - arenas[device].device);
}

DeviceChunk* allocate_device(int device, int64_t stream_id, size_t size) {
  require_same_process();
  std::lock_guard<std::mutex> lock(mutex);
  Arena& from = arena(device);
  size = round_up(size);
  if (from.live + size > limit) throw std::bad_alloc();
  Free taken{0, size, stream_id, {}};
  if (!take_free(from, stream_id, size, taken)) {
    if (from.used + size > kArenaBytes) throw std::bad_alloc();
    taken.offset = from.used;
    from.used += size;
  }
  from.live += size;
  from.peak = std::max(from.peak, from.live);
  poison(device, stream_id, taken.offset, size, kFresh);
  return new DeviceChunk{device, taken.offset, size, stream_id, {}};
}

void free_device(DeviceChunk* chunk) {
  if (in_forked_child()) return;
  std::lock_guard<std::mutex> lock(mutex);
  Arena& to = arenas[chunk->device];
  std::vector<MomentRef> pending;
  for (int64_t use : chunk->uses) pending.push_back(stream(chunk->device, use).mark());
  // With uses, the memory is nobody's until they have passed; it is poisoned when it is handed out again.
  if (pending.empty()) poison(chunk->device, chunk->owner, chunk->offset, chunk->size, kFreed);
  to.live -= chunk->size;
  to.free.push_back({chunk->offset, chunk->size, chunk->owner, std::move(pending)});
  delete chunk;
}

void record_use(DeviceChunk* chunk, int64_t stream_id) {
  std::lock_guard<std::mutex> lock(mutex);
  const bool known = std::find(chunk->uses.begin(), chunk->uses.end(), stream_id) != chunk->uses.end();
  if (stream_id != chunk->owner && !known) chunk->uses.push_back(stream_id);
}

void limit_device_memory(uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  limit = std::min(bytes, kArenaBytes);
}

uint64_t live_bytes(int device) {
  std::lock_guard<std::mutex> lock(mutex);
  return arenas[device].live;
}

uint64_t peak_bytes(int device) {
  std::lock_guard<std::mutex> lock(mutex);
  return arenas[device].peak;
}

void reset_peak(int device) {
  std::lock_guard<std::mutex> lock(mutex);
  arenas[device].peak = arenas[device].live;
}

void empty_cache() {
  for (int device = 0; device < kDevices; ++device) {
    synchronize(device);
    std::lock_guard<std::mutex> lock(mutex);
    if (arenas[device].live > 0) continue;
    arenas[device].free.clear();
    arenas[device].used = 0;
  }
}

PinnedChunk* allocate_pinned(size_t size) {
  require_same_process();
  std::lock_guard<std::mutex> lock(mutex);
  if (pinned_allocations_left == 0) throw std::bad_alloc();
  if (pinned_allocations_left > 0) --pinned_allocations_left;
  pinned_live += size;
  for (size_t i = idle_pinned.size(); i-- > 0;) {
    PinnedChunk* chunk = idle_pinned[i];
    const bool done = std::all_of(chunk->copies.begin(), chunk->copies.end(),
                                  [](const MomentRef& moment) { return moment->reached(); });
    if (chunk->size != size || !done || reinterpret_cast<uintptr_t>(chunk->data) % 4096 != pinned_shift) continue;
    idle_pinned.erase(idle_pinned.begin() + static_cast<std::ptrdiff_t>(i));
    chunk->copies.clear();
    std::memset(chunk->data, kPinned, size);
    return chunk;
  }
  auto* const memory = static_cast<char*>(std::aligned_alloc(4096, (pinned_shift + size + 4095) / 4096 * 4096));
  if (!memory) throw std::bad_alloc();
  std::memset(memory + pinned_shift, kPinned, size);
  auto* chunk = new PinnedChunk{memory + pinned_shift, size, {}};
  pinned[chunk->data] = chunk;
  return chunk;
}

void free_pinned(PinnedChunk* chunk) {
  if (in_forked_child()) return;
  std::lock_guard<std::mutex> lock(mutex);
  pinned_live -= chunk->size;
  idle_pinned.push_back(chunk);
}

PinnedChunk* pinned_chunk(const void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  const char* at = static_cast<const char*>(address);
  auto after = pinned.upper_bound(at);
  if (after == pinned.begin()) return nullptr;
  PinnedChunk* chunk = std::prev(after)->second;
  return at < chunk->data + chunk->size ? chunk : nullptr;
}

void record_copy(PinnedChunk* chunk, MomentRef moment) {
  std::lock_guard<std::mutex> lock(mutex);
  auto& copies = chunk->copies;
  copies.erase(std::remove_if(copies.begin(), copies.end(), [](const MomentRef& m) { return m->reached(); }),
               copies.end());
  copies.push_back(std::move(moment));
}

void fail_pinned_after(int64_t allocations) {
  std::lock_guard<std::mutex> lock(mutex);
  pinned_allocations_left = allocations;
}

void shift_pinned(size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  pinned_shift = bytes;
}

uint64_t pinned_made() {
  std::lock_guard<std::mutex> lock(mutex);
  return pinned.size();
}

uint64_t pinned_bytes() {
  std::lock_guard<std::mutex> lock(mutex);
  return pinned_live;
}

}  // namespace simulated
