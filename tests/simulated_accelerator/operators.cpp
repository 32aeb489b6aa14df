// The operators a loader and its checks need. Everything else goes through the CPU and back.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstring>

#include "backend.h"

namespace simulated {
namespace {

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(at::Device(c10::DeviceType::PrivateUse1)));
  return at::detail::empty_generic(size, device_allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::kFloat), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(at::Device(c10::DeviceType::PrivateUse1)));
  return at::detail::empty_strided_generic(
      size, stride, device_allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype.value_or(at::kFloat));
}

// A tensor as a stream's thread sees it: host memory, and no hold on it, so that memory that is freed too early shows
// its poison.
struct View {
  explicit View(const at::Tensor& tensor)
      : sizes(tensor.sizes().vec()), strides(tensor.strides().vec()), dtype(tensor.scalar_type()) {
    if (tensor.numel() == 0) return;
    data = static_cast<char*>(tensor.data_ptr());
    if (device_of(data) >= 0) data = shadow(data);
  }
  at::Tensor tensor() const { return at::from_blob(data, sizes, strides, at::TensorOptions().dtype(dtype)); }

  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
  char* data = nullptr;
};

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& destination, bool non_blocking) {
  if (destination.numel() == 0) return destination;
  const bool to_device = destination.device().type() == c10::DeviceType::PrivateUse1;
  const bool from_device = source.device().type() == c10::DeviceType::PrivateUse1;
  const int device = to_device ? destination.device().index() : source.device().index();
  Stream& queue = stream(device, current_stream(device));
  PinnedChunk* const pinned =
      to_device && from_device ? nullptr : pinned_chunk((to_device ? source : destination).const_data_ptr());
  at::Tensor staged;  // pageable memory is read before the call returns, as drivers do
  if (to_device && !from_device && !pinned) staged = source.clone();
  const View from(staged.defined() ? staged : source.expand_as(destination));
  const View to(destination);
  const bool plain =
      from.dtype == to.dtype && from.sizes == to.sizes && from.strides == to.strides && destination.is_contiguous();
  const size_t bytes = plain ? destination.nbytes() : 0;
  queue.enqueue([from, to, staged, bytes] {
    if (bytes > 0) {  // keeps bytes that are no value of the dtype, as bool's can be
      std::memcpy(to.data, from.data, bytes);
      return;
    }
    const at::AutoDispatchBelowADInplaceOrView no_history;
    to.tensor().copy_(from.tensor());
  });
  if (pinned) record_copy(pinned, queue.mark());
  if (!to_device && !(non_blocking && pinned)) queue.mark()->wait();
  if (to_device && !from_device && pinned && !non_blocking) queue.mark()->wait();
  return destination;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& destination) {
  return copy_from(source, destination, false);
}

void record_stream(at::Tensor& tensor, c10::Stream used) {
  if (DeviceChunk* chunk = chunk_of(tensor.storage().data_ptr())) record_use(chunk, used.id());
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("record_stream", record_stream);
  m.impl("view", at::native::view);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace
}  // namespace simulated
