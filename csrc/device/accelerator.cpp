#include "device/accelerator.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/byte_range.h"
#include "base/delete_unless_forked.h"
#include "base/error.h"
#include "device/plain_torch.h"

namespace weightload {
namespace {

int64_t signed_size(uint64_t bytes) { return static_cast<int64_t>(bytes); }

at::Tensor part(const at::Tensor& bytes, uint64_t offset, uint64_t count) {
  return bytes.narrow(0, signed_size(offset), signed_size(count));
}

// The bytes of a contiguous tensor, whatever its dtype, without history.
at::Tensor bytes_of(const at::Tensor& tensor) {
  at::Tensor bytes = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(tensor.storage()), tensor.key_set(),
                                                              c10::scalarTypeToTypeMeta(c10::ScalarType::Byte));
  const std::array<int64_t, 1> sizes{signed_size(tensor.nbytes())};
  const std::array<int64_t, 1> strides{1};
  const auto item = static_cast<int64_t>(tensor.element_size());
  bytes.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, tensor.storage_offset() * item);
  return bytes;
}

// Note [The current device]
// A thread's current device is 0 until it is told otherwise. CUDA's guard implementation goes back to it after every
// event call, and going there makes a context on it: half a gigabyte on GPU 0 for each process that loads to another.
// So everything that touches an event does so with the load's own device current. c10::DeviceGuard leaves without
// making a context.

// Host memory whose copies lie before an event.
class TorchSlot final : public HostSlot {
 public:
  TorchSlot(at::Tensor bytes, c10::Device device, bool pinned)
      : bytes_(std::move(bytes)), device_(device), copied_(std::in_place, device.type()) {
    data_ = static_cast<char*>(bytes_.data_ptr());
    size_ = bytes_.nbytes();
    pinned_ = pinned;
  }
  // Torch's caching host allocator keeps page-locked memory until the copies that it saw are done. Other memory goes
  // back to the system at once, so this waits.
  ~TorchSlot() override {
    try {
      const c10::DeviceGuard on_device(device_);
      if (!pinned_) copied_->synchronize();
      copied_.reset();
    } catch (const std::exception&) {
      // The device has failed: nothing is copying any more.
    }
  }

  bool copies_done() override {
    const c10::DeviceGuard on_device(device_);  // see Note [The current device]
    return copied_->query();
  }

  const at::Tensor& bytes() const { return bytes_; }
  c10::Event& copied() { return *copied_; }

 private:
  at::Tensor bytes_;
  const c10::Device device_;
  std::optional<c10::Event> copied_;
};

class TorchBlock final : public DeviceBlock {
 public:
  TorchBlock(at::Tensor bytes, bool adopted)
      : bytes_(std::move(bytes)), copied_(std::in_place, bytes_.device().type()), adopted_(adopted) {}
  ~TorchBlock() override {
    try {
      const c10::DeviceGuard on_device(bytes_.device());
      copied_.reset();
    } catch (const std::exception&) {
      // The device has failed; so has its event.
    }
  }

  const at::Tensor& bytes() const { return bytes_; }
  c10::Event& copied() { return *copied_; }
  bool adopted() const { return adopted_; }

  // True the first time for each stream. The consumer's calls only.
  bool starts_on(const c10::Stream& stream) {
    if (std::find(streams_.begin(), streams_.end(), stream) != streams_.end()) return false;
    streams_.push_back(stream);
    return true;
  }

 private:
  at::Tensor bytes_;
  std::optional<c10::Event> copied_;
  bool adopted_;
  std::vector<c10::Stream> streams_;  // that were made to wait
};

class Accelerator final : public Device {
 public:
  explicit Accelerator(c10::Device device)
      : device_(device),
        backend_(device.type()),
        owner_(backend_.getStream(device)),
        side_(backend_.getStreamFromGlobalPool(device)) {
    const c10::DeviceGuard on_device(device_);
    order(owner_, side_);  // what reads the memory that is loaded into
  }

  std::unique_ptr<HostSlot> allocate_slot(size_t bytes, bool pinned) override {
    const PlainTorch plain;
    const c10::DeviceGuard on_device(device_);
    if (pinned) {
      return std::make_unique<TorchSlot>(pinned_bytes(device_, bytes), device_, true);
    }
    void* memory = std::aligned_alloc(kDirectAlignment, round_up(bytes, kDirectAlignment));
    if (!memory) return nullptr;
    return std::make_unique<TorchSlot>(
        at::from_blob(memory, {signed_size(bytes)}, &std::free, at::TensorOptions().dtype(at::kByte)), device_, false);
  }

  DeviceBlockRef allocate_block(uint64_t bytes) override {
    const PlainTorch plain;
    const c10::DeviceGuard on_device(device_);
    try {
      const c10::StreamGuard on_owner(owner_);
      at::Tensor memory = at::empty({signed_size(bytes)}, at::TensorOptions().dtype(at::kByte).device(device_));
      order(owner_, side_);  // what its last user queued
      return std::make_shared<TorchBlock>(std::move(memory), false);
    } catch (const c10::OutOfMemoryError& error) {
      throw Error(ErrorKind::device_memory, error.what_without_backtrace());
    }
  }

  void copy(HostSlot& slot, uint64_t slot_offset, DeviceBlock& block, uint64_t block_offset, uint64_t bytes) override {
    const PlainTorch plain;
    const at::AutoDispatchBelowADInplaceOrView no_history;
    const c10::DeviceGuard on_device(device_);
    const c10::StreamGuard on_side(side_);
    part(static_cast<TorchBlock&>(block).bytes(), block_offset, bytes)
        .copy_(part(static_cast<TorchSlot&>(slot).bytes(), slot_offset, bytes), /*non_blocking=*/true);
  }

  void mark_slot(HostSlot& slot) override {
    const c10::DeviceGuard on_device(device_);
    static_cast<TorchSlot&>(slot).copied().record(side_);
  }

  void mark_block(DeviceBlock& block) override {
    const c10::DeviceGuard on_device(device_);
    auto& marked = static_cast<TorchBlock&>(block);
    if (!marked.adopted()) marked.copied().record(side_);
  }

  void await_block(DeviceBlock& block) override {
    auto& awaited = static_cast<TorchBlock&>(block);
    const c10::Stream current = backend_.getStream(device_);
    if (!awaited.starts_on(current)) return;
    const c10::DeviceGuard on_device(device_);
    awaited.copied().block(current);
    // The allocator knows of the owner stream only.
    if (current != owner_) backend_.recordDataPtrOnStream(awaited.bytes().storage().data_ptr(), current);
  }

  void await_all() override {
    const c10::DeviceGuard on_device(device_);
    order(side_, backend_.getStream(device_));
  }

  void behind_copies(DeviceBlock& block) override {
    const c10::DeviceGuard on_device(device_);
    static_cast<TorchBlock&>(block).copied().block(collective_stream());
  }

  void on_collective_stream(const std::function<void()>& issue) override {
    const PlainTorch plain;
    const at::AutoDispatchBelowADInplaceOrView no_history;
    const c10::DeviceGuard on_device(device_);
    const c10::StreamGuard on_stream(collective_stream());
    issue();
  }

  void mark_shared(DeviceBlock& block) override {
    const c10::DeviceGuard on_device(device_);
    static_cast<TorchBlock&>(block).copied().record(collective_stream());
  }

  void abandon(DeviceBlock& block) noexcept override {
    try {
      const c10::DeviceGuard on_device(device_);
      const c10::DataPtr& memory = static_cast<TorchBlock&>(block).bytes().storage().data_ptr();
      backend_.recordDataPtrOnStream(memory, side_);
      if (collective_) backend_.recordDataPtrOnStream(memory, *collective_);
    } catch (const std::exception&) {
      // The device has failed: nothing is copying any more.
    }
  }

 private:
  // The consumer's calls only.
  const c10::Stream& collective_stream() {
    if (!collective_) collective_ = backend_.getStreamFromGlobalPool(device_);
    return *collective_;
  }

  // What is queued on `second` from now on runs after what `first` has queued so far. With the device current.
  void order(const c10::Stream& first, const c10::Stream& second) const {
    c10::Event event(device_.type());
    event.record(first);
    event.block(second);
  }

  const c10::Device device_;
  const c10::impl::VirtualGuardImpl backend_;
  const c10::Stream owner_;
  const c10::Stream side_;
  std::optional<c10::Stream> collective_;
};

}  // namespace

at::Tensor pinned_bytes(c10::Device device, uint64_t bytes) {
  const PlainTorch plain;
  // Not at::empty with pinned_memory: that asks the process's first accelerator, which may be another.
  c10::Allocator* const allocator = at::globalContext().getPinnedMemoryAllocator(device.type());
  const std::array<int64_t, 1> sizes{signed_size(bytes)};
  return at::detail::empty_generic(sizes, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), at::kByte,
                                   std::nullopt);
}

std::shared_ptr<Device> make_accelerator(c10::Device device) { return {new Accelerator(device), DeleteUnlessForked{}}; }

DeviceBlockRef adopt_tensor(const at::Tensor& tensor) {
  const PlainTorch plain;
  return std::make_shared<TorchBlock>(bytes_of(tensor), true);
}

const at::Tensor& block_bytes(const DeviceBlock& block) { return static_cast<const TorchBlock&>(block).bytes(); }

}  // namespace weightload
