#include "host_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>

#include "arena.h"

namespace simulated {
namespace {

constexpr int kFresh = 0xEE;

struct Locked {
  size_t bytes;
  bool ours;  // allocated here, not registered
};

struct Table {
  std::mutex mutex;
  std::map<uintptr_t, Locked> ranges;
  size_t bytes = 0, made = 0;
  long left = -1;
};

Table& table() {
  static Table* const one = new Table;
  return *one;
}

size_t pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// With the table locked: whether page-locking works this time.
bool one_more() {
  Table& t = table();
  if (t.left == 0) return false;
  if (t.left > 0) --t.left;
  ++t.made;
  return true;
}

bool take(void* pointer, bool ours, size_t* bytes) {
  std::lock_guard<std::mutex> lock(table().mutex);
  const auto at = table().ranges.find(reinterpret_cast<uintptr_t>(pointer));
  if (at == table().ranges.end() || at->second.ours != ours) return false;
  *bytes = at->second.bytes;
  table().bytes -= at->second.bytes;
  table().ranges.erase(at);
  return true;
}

}  // namespace

void* allocate_locked(size_t bytes) {
  std::lock_guard<std::mutex> lock(table().mutex);
  if (!one_more()) return nullptr;
  void* const made = ::mmap(nullptr, pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) return nullptr;
  std::memset(made, kFresh, pages(bytes));
  table().ranges[reinterpret_cast<uintptr_t>(made)] = {bytes, true};
  table().bytes += bytes;
  return made;
}

bool free_locked(void* pointer, size_t* bytes) {
  if (!take(pointer, true, bytes)) return false;
  ::munmap(pointer, pages(*bytes));
  return true;
}

bool register_locked(void* pointer, size_t bytes) {
  if (is_locked(pointer, 1)) return false;
  std::lock_guard<std::mutex> lock(table().mutex);
  if (!one_more()) return false;
  table().ranges[reinterpret_cast<uintptr_t>(pointer)] = {bytes, false};
  table().bytes += bytes;
  return true;
}

bool unregister_locked(void* pointer, size_t* bytes) { return take(pointer, false, bytes); }

bool locked_range(const void* pointer, uintptr_t* begin, size_t* bytes) {
  std::lock_guard<std::mutex> lock(table().mutex);
  auto at = table().ranges.upper_bound(reinterpret_cast<uintptr_t>(pointer));
  if (at == table().ranges.begin()) return false;
  --at;
  *begin = at->first;
  *bytes = at->second.bytes;
  return reinterpret_cast<uintptr_t>(pointer) < *begin + *bytes;
}

bool is_locked(const void* pointer, size_t bytes) {
  uintptr_t begin = 0;
  size_t size = 0;
  return locked_range(pointer, &begin, &size) && reinterpret_cast<uintptr_t>(pointer) + bytes <= begin + size;
}

size_t locked_bytes() {
  std::lock_guard<std::mutex> lock(table().mutex);
  return table().bytes;
}

size_t locked_made() {
  std::lock_guard<std::mutex> lock(table().mutex);
  return table().made;
}

void fail_locked_after(long count) {
  std::lock_guard<std::mutex> lock(table().mutex);
  table().left = count;
}

uint64_t digest(const void* data, size_t bytes) {
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;
  const char* at = static_cast<const char*>(data);
  uint64_t lanes[4] = {1, 2, 3, 4};
  for (; bytes >= 32; bytes -= 32, at += 32) {
    uint64_t words[4];
    std::memcpy(words, at, 32);
    for (int i = 0; i < 4; ++i) lanes[i] = (lanes[i] ^ words[i]) * kOdd;
  }
  uint64_t sum = lanes[0] ^ (lanes[1] << 1) ^ (lanes[2] << 2) ^ (lanes[3] << 3);
  for (; bytes > 0; --bytes, ++at) sum = (sum ^ static_cast<unsigned char>(*at)) * kOdd;
  return sum ^ (sum >> 31);
}

}  // namespace simulated
