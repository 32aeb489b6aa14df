// Operators of torch on the simulated CUDA: copies and fills are torch's own; for the rest there are no kernels, so the
// CPU computes them. Memory that torch's allocators hand out or take back is poisoned, on the stream that owns it.
#include <ATen/Context.h>
#include <ATen/cuda/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <mutex>
#include <set>
#include <string>

#include "../runtime/control.h"
#include "host_poison.h"

namespace {

using c10::cuda::CUDACachingAllocator::TraceEntry;

constexpr int kHandedOut = 0xCD, kGivenBack = 0xDD;

// By the allocator, with its lock held.
void poison(const TraceEntry& entry) {
  int value = kHandedOut;
  const char* what = "poison of memory handed out";
  if (entry.action_ == TraceEntry::FREE_COMPLETED) {
    value = kGivenBack;
    what = "poison of memory given back";
  } else if (entry.action_ != TraceEntry::ALLOC) {
    return;
  }
  simulated_cuda_poison(reinterpret_cast<void*>(entry.addr_), entry.size_, value,
                        static_cast<cudaStream_t>(entry.stream_), what);
}

// The allocators exist from CUDA's initialization on, which the first tensor may bring about.
void watch_allocators() {
  static std::once_flag once;
  std::call_once(once, [] {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    if (c10::cuda::CUDACachingAllocator::get()->name() == "native") {
      c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker(&poison);
    }
  });
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                 std::optional<at::Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  watch_allocators();
  return at::detail::empty_cuda(size, dtype, layout, device, pin, format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout> layout, std::optional<at::Device> device, std::optional<bool> pin) {
  watch_allocators();
  return at::detail::empty_strided_cuda(size, stride, dtype, layout, device, pin);
}

// All bytes from the tensor's first to its last, on the CPU, seen with the tensor's sizes and strides.
at::Tensor fetch(const at::Tensor& there) {
  int64_t span = there.numel() > 0 ? 1 : 0;
  for (int64_t d = 0; d < there.dim() && there.numel() > 0; ++d) span += (there.size(d) - 1) * there.stride(d);
  at::Tensor here = at::empty({span}, there.options().device(at::kCPU));
  at::Tensor flat = there.as_strided({span}, {1}, there.storage_offset());
  at::native::copy_(here, flat, false);
  return here.as_strided(there.sizes(), there.strides(), 0);
}

bool plain(const at::Tensor& a, const at::Tensor& b) {
  return a.dtype() == b.dtype() && a.sizes() == b.sizes() && a.strides() == b.strides() &&
         a.is_non_overlapping_and_dense() && a.is_conj() == b.is_conj() && a.is_neg() == b.is_neg();
}

// Plain copies are torch's, by cudaMemcpyAsync. What needs a kernel (strides, another dtype) goes by the CPU.
at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.numel() == 0 || plain(self, source)) return at::native::copy_(self, source, non_blocking);
  const c10::DeviceGuard guard(self.is_cuda() ? self.device() : source.device());
  const at::Tensor from = source.is_cuda() ? fetch(source) : source;
  if (!self.is_cuda()) return self.copy_(from);
  if (self.is_non_overlapping_and_dense()) {
    at::Tensor made = at::empty_strided(self.sizes(), self.strides(), self.options().device(at::kCPU)).copy_(from);
    return at::native::copy_(self, made, false);
  }
  at::Tensor whole = fetch(self);
  whole.copy_(from);
  const int64_t span = static_cast<int64_t>(whole.storage().nbytes()) / static_cast<int64_t>(whole.element_size());
  at::Tensor to = self.as_strided({span}, {1}, self.storage_offset());
  at::native::copy_(to, whole.as_strided({span}, {1}, 0), false);
  return self;
}

at::Tensor copy_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (to.sizes() != self.sizes()) to.resize_(self.sizes());
  const_cast<at::Tensor&>(to).copy_(self);
  return to;
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  // A generator of the device is none the CPU knows.
  for (c10::IValue& value : *stack)
    if (value.isGenerator() && value.toGenerator().device().is_cuda()) value = c10::IValue();
  at::native::cpu_fallback(op, stack);
}

// What torch does without a kernel: memory, views, fills (which the runtime knows by name), and what asks the host.
const std::set<std::string>& kept() {
  static const std::set<std::string> names = {"aten::empty.memory_format",
                                              "aten::empty_strided",
                                              "aten::as_strided",
                                              "aten::view",
                                              "aten::_reshape_alias",
                                              "aten::set_",
                                              "aten::set_.source_Storage",
                                              "aten::set_.source_Storage_storage_offset",
                                              "aten::set_.source_Tensor",
                                              "aten::resize_",
                                              "aten::record_stream",
                                              "aten::is_pinned",
                                              "aten::_pin_memory",
                                              "aten::_local_scalar_dense",
                                              "aten::fill_.Scalar",
                                              "aten::zero_",
                                              "aten::unfold",
                                              "aten::view.dtype",
                                              "aten::is_set_to",
                                              "aten::copy_"};
  return names;
}

struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

struct Registration {
  Registration() {
    Silence silence;  // each kernel of torch's is replaced, which it warns of
    const c10::WarningUtils::WarningHandlerGuard guard(&silence);
    static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
    std::set<std::string> names;
    for (const c10::OperatorName& op :
         c10::Dispatcher::singleton().getRegistrationsForDispatchKey(c10::DispatchKey::CUDA)) {
      const std::string full = op.name + (op.overload_name.empty() ? "" : "." + op.overload_name);
      if (op.name.rfind("aten::", 0) == 0 && kept().count(full) == 0) names.insert(full);
    }
    names.erase("aten::_copy_from_and_resize");
    for (const std::string& name : names)
      library.impl(name.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
    simulated_cuda::poison_pinned_memory();
    library.impl("empty.memory_format", empty);
    library.impl("empty_strided", empty_strided);
    library.impl("copy_", copy);
    library.impl("_copy_from_and_resize", copy_and_resize);
  }
};

const Registration registration;

}  // namespace
