#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <pybind11/typing.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "bindings/register.h"

namespace py = pybind11;

namespace weightload {
namespace {

// Begin and end of the memory that is all of a tensor's elements in their order, without a bit that says how to see
// them otherwise; {0, 0} of none. Nothing where the tensor is of another kind, or its storage has less.
std::optional<std::pair<uintptr_t, uintptr_t>> dense_memory(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kWrappers(
      {c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::NestedTensor});
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  if (impl.key_set().has_any(kWrappers) || impl.layout() != c10::kStrided || impl.is_meta() || !impl.has_storage() ||
      !impl.is_contiguous() || tensor.is_quantized() || tensor.is_conj() || tensor.is_neg())
    return std::nullopt;
  const auto size = static_cast<uint64_t>(impl.numel()) * impl.itemsize();
  if (size == 0) return std::pair<uintptr_t, uintptr_t>{0, 0};
  const uint64_t before = static_cast<uint64_t>(impl.storage_offset()) * impl.itemsize();
  if (impl.storage().nbytes() < before + size) return std::nullopt;
  // To be written to: of memory that is copied when somebody writes (lazy clones), the copy.
  uintptr_t begin = 0;
  try {
    begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  } catch (const c10::Error&) {  // one that says so, as torch.compile makes them
  }
  if (begin == 0) return std::nullopt;
  return std::pair<uintptr_t, uintptr_t>{begin, begin + size};
}

}  // namespace

void register_tensor_memory(py::module_& module) {
  module.def(
      "dense_memory", &dense_memory, py::arg("tensor"),
      "Addresses of the begin and the end of a plain tensor's memory, (0, 0) where it has no elements; None if it "
      "is not dense and contiguous, or is a wrapper.");
}

}  // namespace weightload
