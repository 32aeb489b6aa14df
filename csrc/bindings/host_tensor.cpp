#include "bindings/host_tensor.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/TensorBase.h>
#include <c10/core/ScalarType.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <limits>
#include <string>

#include "base/error.h"

namespace weightload {
namespace {

[[noreturn]] void fail_tensor(const HostTensor& tensor, const std::string& what) {
  throw Error(ErrorKind::tensor, what, {tensor.file->path(), tensor.info->name, {}, 0});
}

c10::ScalarType torch_dtype(const HostTensor& tensor) {
  switch (tensor.info->dtype) {
    case Dtype::BOOL: return c10::ScalarType::Bool;
    case Dtype::F4: return c10::ScalarType::Float4_e2m1fn_x2;
    case Dtype::U8: return c10::ScalarType::Byte;
    case Dtype::I8: return c10::ScalarType::Char;
    case Dtype::F8_E5M2: return c10::ScalarType::Float8_e5m2;
    case Dtype::F8_E4M3: return c10::ScalarType::Float8_e4m3fn;
    case Dtype::F8_E8M0: return c10::ScalarType::Float8_e8m0fnu;
    case Dtype::F8_E4M3FNUZ: return c10::ScalarType::Float8_e4m3fnuz;
    case Dtype::F8_E5M2FNUZ: return c10::ScalarType::Float8_e5m2fnuz;
    case Dtype::I16: return c10::ScalarType::Short;
    case Dtype::U16: return c10::ScalarType::UInt16;
    case Dtype::F16: return c10::ScalarType::Half;
    case Dtype::BF16: return c10::ScalarType::BFloat16;
    case Dtype::I32: return c10::ScalarType::Int;
    case Dtype::U32: return c10::ScalarType::UInt32;
    case Dtype::F32: return c10::ScalarType::Float;
    case Dtype::C64: return c10::ScalarType::ComplexFloat;
    case Dtype::F64: return c10::ScalarType::Double;
    case Dtype::I64: return c10::ScalarType::Long;
    case Dtype::U64: return c10::ScalarType::UInt64;
    case Dtype::F6_E2M3:
    case Dtype::F6_E3M2: break;
  }
  fail_tensor(tensor, "torch has no dtype for " + std::string(dtype_name(tensor.info->dtype)));
}

using Sizes = c10::SmallVector<int64_t, 8>;

Sizes torch_sizes(const HostTensor& tensor) {
  Sizes sizes;
  for (uint64_t extent : tensor.info->shape) {
    if (extent > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      fail_tensor(tensor, "torch cannot hold a dimension of " + std::to_string(extent));
    sizes.push_back(static_cast<int64_t>(extent));
  }
  if (tensor.info->dtype == Dtype::F4) {
    // torch's type packs two elements, so the last dimension counts pairs.
    if (sizes.empty() || sizes.back() % 2 != 0)
      fail_tensor(tensor, "f4_x2 dtype requires that the last dim be divisible by 2 in torch");
    sizes.back() /= 2;
  }
  return sizes;
}

// Row-major strides. Only an empty tensor's can leave 64 bits, where their values do not matter: unsigned, so
// that wrapping round is defined.
Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  uint64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = static_cast<int64_t>(stride);
    stride *= static_cast<uint64_t>(sizes[i] > 0 ? sizes[i] : 1);
  }
  return strides;
}

void release_memory(void* memory) { static_cast<HostMemory*>(memory)->release(); }

}  // namespace

PyObject* wrap_host_tensor(HostTensor& tensor) {
  const c10::ScalarType dtype = torch_dtype(tensor);
  const Sizes sizes = torch_sizes(tensor);
  c10::DataPtr data(nullptr, c10::Device(c10::kCPU));
  if (tensor.data) {
    HostMemory* memory = tensor.memory.get();
    memory->retain();
    data = c10::DataPtr(tensor.data, memory, &release_memory, c10::Device(c10::kCPU));
  }
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(),
                                                       static_cast<int64_t>(tensor.info->bytes.size()), std::move(data),
                                                       /*allocator=*/nullptr, /*resizable=*/false);
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(dtype));
  result.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, contiguous_strides(sizes));
  PyObject* wrapped = THPVariable_Wrap(std::move(result));
  if (!wrapped) throw std::runtime_error("torch could not wrap a tensor");
  return wrapped;
}

}  // namespace weightload
