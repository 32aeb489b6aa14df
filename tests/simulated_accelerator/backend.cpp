// What torch asks of a device: a guard (devices, streams, events), allocators, hooks.
#include "backend.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <memory>
#include <new>
#include <utility>

namespace simulated {
namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
std::atomic<bool> available{false};
std::atomic<uint64_t> next_pool_stream{0};
thread_local int device_now = 0;
thread_local int64_t stream_now[kDevices] = {};

struct Event {
  std::mutex mutex;
  MomentRef latest;

  MomentRef get() {
    std::lock_guard<std::mutex> lock(mutex);
    return latest;
  }
};

// Devices that this process has a context on. As in CUDA: a thread that switches to a device makes one, leaving a guard
// does not, and event calls switch to the event's device and back to whatever was current.
std::atomic<bool> contexts[kDevices];

void switch_to(int device) {
  device_now = device;
  contexts[device] = true;
}

class Visit {
 public:
  explicit Visit(int device) : before_(device_now) { switch_to(device); }
  ~Visit() { switch_to(before_); }

 private:
  int before_;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    switch_to(device.index());
    return before;
  }
  c10::Device getDevice() const override { return {kType, static_cast<c10::DeviceIndex>(device_now)}; }
  void setDevice(c10::Device device) const override { switch_to(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { device_now = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return available ? kDevices : 0; }

  static c10::Stream make(c10::Device device, int64_t id) { return c10::Stream(c10::Stream::UNSAFE, device, id); }
  static c10::Device whole(c10::Device device) {
    return device.has_index() ? device : c10::Device(kType, static_cast<c10::DeviceIndex>(device_now));
  }
  c10::Stream getStream(c10::Device device) const override {
    device = whole(device);
    return make(device, stream_now[device.index()]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return make(whole(device), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return make(whole(device), 1 + static_cast<int64_t>(next_pool_stream++ % (kStreams - 1)));
  }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStreamFromGlobalPool(device, false); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return make(stream.device(), std::exchange(stream_now[stream.device_index()], stream.id()));
  }
  static Stream& of(const c10::Stream& stream) { return simulated::stream(stream.device_index(), stream.id()); }
  bool queryStream(const c10::Stream& stream) const override { return of(stream).idle(); }
  void synchronizeStream(const c10::Stream& stream) const override { of(stream).mark()->wait(); }
  void synchronizeDevice(const c10::DeviceIndex device) const override { synchronize(device); }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    const Visit visit(stream.device_index());
    if (!*event) *event = new Event;
    auto* recorded = static_cast<Event*>(*event);
    MomentRef moment = of(stream).mark();
    std::lock_guard<std::mutex> lock(recorded->mutex);
    recorded->latest = std::move(moment);
  }
  void block(void* event, const c10::Stream& stream) const override {
    const Visit visit(stream.device_index());
    if (event) of(stream).wait_for(static_cast<Event*>(event)->get());
  }
  bool queryEvent(void* event) const override {
    contexts[device_now] = true;
    return !event || static_cast<Event*>(event)->get()->reached();
  }
  void synchronizeEvent(void* event) const override {
    if (event) static_cast<Event*>(event)->get()->wait();
  }
  void destroyEvent(void* event, const c10::DeviceIndex device) const noexcept override {
    const Visit visit(device);
    delete static_cast<Event*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    if (DeviceChunk* chunk = chunk_of(data)) record_use(chunk, stream.id());
  }
};

void free_device_context(void* context) { free_device(static_cast<DeviceChunk*>(context)); }
void free_pinned_context(void* context) { free_pinned(static_cast<PinnedChunk*>(context)); }

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::Device device(kType, static_cast<c10::DeviceIndex>(device_now));
    if (size == 0) return {nullptr, device};
    DeviceChunk* chunk = nullptr;
    try {
      chunk = allocate_device(device_now, stream_now[device_now], size);
    } catch (const std::bad_alloc&) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "simulated accelerator out of memory: tried to allocate ", size,
                       " bytes, ", live_bytes(device_now), " in use");
    }
    return {device_address(*chunk), chunk, &free_device_context, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "not simulated"); }
};

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    PinnedChunk* chunk = nullptr;
    try {
      chunk = allocate_pinned(size);
    } catch (const std::bad_alloc&) {
      TORCH_CHECK(false, "simulated accelerator: page-locking ", size, " bytes failed");
    }
    return {chunk->data, chunk, &free_pinned_context, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return available; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return available ? kDevices : 0; }
  void setCurrentDevice(c10::DeviceIndex device) const override { switch_to(device); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(device_now); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return static_cast<c10::DeviceIndex>(std::exchange(device_now, device));
  }
  bool isPinnedPtr(const void* address) const override { return pinned_chunk(address) != nullptr; }
  at::Device getDeviceFromPtr(void* address) const override {
    return {kType, static_cast<c10::DeviceIndex>(device_of(address))};
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
[[maybe_unused]] const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

}  // namespace

c10::Allocator* device_allocator() {
  static DeviceAllocator allocator;
  return &allocator;
}
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, device_allocator());

int current_device() { return device_now; }
int64_t current_stream(int device) { return stream_now[device]; }
void set_available(bool is) { available = is; }
bool is_available() { return available; }
bool has_context(int device) { return contexts[device]; }

DeviceChunk* chunk_of(const c10::DataPtr& data) {
  return data.get_deleter() == &free_device_context ? static_cast<DeviceChunk*>(data.get_context()) : nullptr;
}

}  // namespace simulated
