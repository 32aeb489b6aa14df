#include "copy.h"

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "arena.h"
#include "capture.h"
#include "host_memory.h"
#include "report.h"

namespace simulated {
namespace {

constexpr int kUnwritten = 0xA5;
constexpr size_t kStaged =
    64 << 10;  // a driver copies so much through memory of its own, without waiting for the device

enum class Place { device, locked, pageable, nowhere };

Place place_of(const void* pointer, size_t bytes) {
  if (device_of(pointer) >= 0) return allocation_of(pointer, bytes) ? Place::device : Place::nowhere;
  return is_locked(pointer, bytes) ? Place::locked : Place::pageable;
}

size_t extent(size_t width, size_t height, size_t pitch) { return height == 0 ? 0 : pitch * (height - 1) + width; }

void move(const Copy& c, char* to, const char* from) {
  for (size_t row = 0; row < c.height; ++row) std::memmove(to + row * c.to_pitch, from + row * c.from_pitch, c.width);
}

bool fits(cudaMemcpyKind kind, bool from_device, bool to_device) {
  switch (kind) {
    case cudaMemcpyHostToHost: return !from_device && !to_device;
    case cudaMemcpyHostToDevice: return !from_device && to_device;
    case cudaMemcpyDeviceToHost: return from_device && !to_device;
    case cudaMemcpyDeviceToDevice: return from_device && to_device;
    default: return true;
  }
}

const char* name_of(bool from_device, bool to_device) {
  if (from_device) return to_device ? "copy on devices" : "copy to the host";
  return to_device ? "copy to the device" : "copy on the host";
}

uintptr_t number(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Page-locked memory that nothing else uses any more.
bool quiet(const void* pointer, size_t bytes, bool writes_only) {
  std::lock_guard<std::mutex> lock(order_lock());
  return checker().settled(number(pointer), bytes, host_clock(), writes_only);
}

}  // namespace

cudaError_t copy(const Copy& given, const StreamRef& stream, bool host_waits) {
  Copy c = given;
  if (c.width == 0 || c.height == 0) return cudaSuccess;
  const size_t read = extent(c.width, c.height, c.from_pitch), written = extent(c.width, c.height, c.to_pitch);
  const Place from = place_of(c.from, read), to = place_of(c.to, written);
  if (from == Place::nowhere || to == Place::nowhere) {
    std::fprintf(stderr, "the simulated CUDA refuses a copy of %zu bytes: no memory lies at all of its %s\n",
                 from == Place::nowhere ? read : written, from == Place::nowhere ? "source" : "target");
    return cudaErrorInvalidValue;
  }
  const bool from_device = from == Place::device, to_device = to == Place::device;
  if (!fits(c.kind, from_device, to_device)) {
    std::fprintf(stderr, "the simulated CUDA refuses a copy whose kind, %d, its memory is not of\n", c.kind);
    return cudaErrorInvalidValue;
  }
  if (is_capturing(*stream)) return cudaSuccess;

  std::vector<Access> accesses;
  if (from != Place::pageable) accesses.push_back({number(c.from), read, false});
  if (to != Place::pageable) accesses.push_back({number(c.to), written, true});
  std::shared_ptr<std::vector<char>> staged;
  if (from == Place::pageable) {
    const char* const bytes = static_cast<const char*>(c.from);
    staged = std::make_shared<std::vector<char>>(bytes, bytes + read);
  }
  const bool checked = from == Place::locked && quiet(c.from, read, true);
  const uint64_t before = checked ? digest(c.from, read) : 0;
  if (to == Place::locked && !host_waits && c.height == 1 && quiet(c.to, written, false)) {
    std::memset(c.to, kUnwritten, written);
  }
  enqueue(stream, name_of(from_device, to_device), accesses, [c, staged, checked, before, read, stream] {
    if (checked && digest(c.from, read) != before) {
      add_report("changed: page-locked memory [" + std::to_string(number(c.from)) + ", " +
                 std::to_string(number(c.from) + read) + ") between the queueing of a copy from it on " +
                 stream->name() + " and its run");
    }
    move(c, reach(c.to), staged ? staged->data() : reach(c.from));
  });
  const bool small = from == Place::pageable && to_device && read <= kStaged;
  const bool device_only = from_device && to_device;
  if (to == Place::pageable || (host_waits && !small && !device_only)) synchronize(stream);
  return cudaSuccess;
}

cudaError_t set(void* to, int value, size_t bytes, const StreamRef& stream, const char* what) {
  if (bytes == 0) return cudaSuccess;
  const Place place = place_of(to, bytes);
  if (place != Place::device && place != Place::locked) return cudaErrorInvalidValue;
  if (is_capturing(*stream)) return cudaSuccess;
  enqueue(stream, what, {{number(to), bytes, true}}, [=] { std::memset(reach(to), value, bytes); });
  return cudaSuccess;
}

}  // namespace simulated
