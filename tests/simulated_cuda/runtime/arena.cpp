#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

namespace simulated {
namespace {

constexpr size_t kSpan = size_t{256} << 30;  // addresses of a device
constexpr size_t kAll = kSpan * kDevices;
constexpr unsigned char kFresh = 0xCB;
constexpr size_t kPoisoned = size_t{256} << 20;

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

size_t first_limit() {
  const char* const megabytes = std::getenv("WEIGHTLOAD_SIMULATED_CUDA_MEMORY_MB");
  return (megabytes != nullptr ? std::stoull(megabytes) : 8192) << 20;
}

struct Arena {
  std::mutex mutex;
  char* base = nullptr;
  std::map<uintptr_t, size_t> free[kDevices];
  uintptr_t next[kDevices] = {};  // where the search begins: an address comes again only after all others
  std::map<uintptr_t, Allocation> live;
  size_t used[kDevices] = {}, peak[kDevices] = {}, total[kDevices] = {};

  Arena() {
    void* const made =
        ::mmap(nullptr, 2 * kAll + kGranule, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) std::abort();
    base = reinterpret_cast<char*>(rounded(reinterpret_cast<uintptr_t>(made), kGranule));
    for (int d = 0; d < kDevices; ++d) {
      next[d] = reinterpret_cast<uintptr_t>(base) + static_cast<size_t>(d) * kSpan;
      free[d][next[d]] = kSpan;
      total[d] = first_limit();
    }
  }
};

Arena& arena() {
  static Arena* const one = new Arena;  // streams may run on while the process ends
  return *one;
}

}  // namespace

int device_of(const void* pointer) {
  const auto offset = static_cast<const char*>(pointer) - arena().base;
  if (offset < 0 || static_cast<size_t>(offset) >= kAll) return -1;
  return static_cast<int>(static_cast<size_t>(offset) / kSpan);
}

char* reach(const void* pointer) {
  char* const bytes = static_cast<char*>(const_cast<void*>(pointer));
  return device_of(pointer) < 0 ? bytes : bytes + kAll;
}

void* reserve_addresses(int device, size_t bytes) {
  bytes = rounded(bytes, kGranule);
  std::lock_guard<std::mutex> lock(arena().mutex);
  auto& free = arena().free[device];
  auto at = free.lower_bound(arena().next[device]);
  for (size_t looked = 0; looked <= free.size(); ++looked, ++at) {
    if (at == free.end()) at = free.begin();
    if (at == free.end()) return nullptr;
    if (at->second < bytes) continue;
    const auto [begin, size] = *at;
    free.erase(at);
    if (size > bytes) free[begin + bytes] = size - bytes;
    arena().next[device] = begin + bytes;
    return reinterpret_cast<void*>(begin);
  }
  return nullptr;
}

void release_addresses(void* pointer, size_t bytes) {
  bytes = rounded(bytes, kGranule);
  const int device = device_of(pointer);
  std::lock_guard<std::mutex> lock(arena().mutex);
  auto& free = arena().free[device];
  auto at = free.emplace(reinterpret_cast<uintptr_t>(pointer), bytes).first;
  if (const auto after = std::next(at); after != free.end() && at->first + at->second == after->first) {
    at->second += after->second;
    free.erase(after);
  }
  if (at != free.begin()) {
    if (const auto before = std::prev(at); before->first + before->second == at->first) {
      before->second += at->second;
      free.erase(at);
    }
  }
}

bool take_memory(int device, size_t bytes) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  size_t& used = arena().used[device];
  if (used + bytes > arena().total[device]) return false;
  used += bytes;
  arena().peak[device] = std::max(arena().peak[device], used);
  return true;
}

void give_memory(int device, size_t bytes) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  arena().used[device] -= bytes;
}

bool commit(void* pointer, size_t bytes, int descriptor) {
  bytes = rounded(bytes, kPage);
  const int device = device_of(pointer);
  if (descriptor < 0 && !take_memory(device, bytes)) return false;
  const int flags = MAP_FIXED | (descriptor < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
  void* const made = ::mmap(reach(pointer), bytes, PROT_READ | PROT_WRITE, flags, descriptor, 0);
  if (made != MAP_FAILED) {
    // Not the gigabytes that some loaders take at once: as pages that nobody has touched they cost nothing.
    if (descriptor < 0 && bytes <= kPoisoned) std::fill_n(reach(pointer), bytes, static_cast<char>(kFresh));
    return true;
  }
  if (descriptor < 0) give_memory(device, bytes);
  return false;
}

void decommit(void* pointer, size_t bytes, bool counted) {
  bytes = rounded(bytes, kPage);
  ::mmap(reach(pointer), bytes, PROT_NONE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (counted) give_memory(device_of(pointer), bytes);
}

void note_allocation(void* pointer, size_t bytes) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  arena().live[begin] = {begin, bytes, device_of(pointer)};
}

void drop_allocation(void* pointer) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  arena().live.erase(reinterpret_cast<uintptr_t>(pointer));
}

void* allocate(int device, size_t bytes) {
  bytes = rounded(bytes, kPage);  // of which a program may use all, as it may on a device
  void* const pointer = reserve_addresses(device, bytes);
  if (pointer == nullptr) return nullptr;
  if (!commit(pointer, bytes, -1)) {
    release_addresses(pointer, bytes);
    return nullptr;
  }
  note_allocation(pointer, bytes);
  return pointer;
}

std::optional<Allocation> release(void* pointer) {
  Allocation found;
  {
    std::lock_guard<std::mutex> lock(arena().mutex);
    const auto at = arena().live.find(reinterpret_cast<uintptr_t>(pointer));
    if (at == arena().live.end()) return std::nullopt;
    found = at->second;
    arena().live.erase(at);
  }
  decommit(pointer, found.bytes, true);
  release_addresses(pointer, found.bytes);
  return found;
}

std::optional<Allocation> allocation_of(const void* pointer, size_t bytes) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  auto at = arena().live.upper_bound(begin);
  if (at == arena().live.begin()) return std::nullopt;
  const Allocation first = (--at)->second;
  // Memory that was mapped piece by piece goes on in the next piece.
  uintptr_t end = first.begin + first.bytes;
  if (begin >= end) return std::nullopt;
  while (end < begin + bytes && ++at != arena().live.end() && at->first == end) end += at->second.bytes;
  return begin + bytes <= end ? std::optional(first) : std::nullopt;
}

size_t used_memory(int device) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  return arena().used[device];
}

size_t peak_memory(int device) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  return arena().peak[device];
}

void reset_peak(int device) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  arena().peak[device] = arena().used[device];
}

size_t total_memory(int device) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  return arena().total[device];
}

void limit_memory(int device, size_t bytes) {
  std::lock_guard<std::mutex> lock(arena().mutex);
  arena().total[device] = bytes;
}

}  // namespace simulated
