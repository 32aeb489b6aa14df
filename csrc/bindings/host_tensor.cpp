#include "bindings/host_tensor.h"

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

#include "bindings/new_tensor.h"
#include "bindings/tensor_meta.h"

namespace weightload {
namespace {

void release_memory(void* memory) { static_cast<HostMemory*>(memory)->release(); }

// A tensor's memory, which the tensor owns.
class TensorMemory final : public HostMemory {
 public:
  explicit TensorMemory(at::Tensor tensor) : tensor_(std::move(tensor)) {
    data_ = static_cast<char*>(tensor_.data_ptr());
    size_ = tensor_.nbytes();
  }

 private:
  at::Tensor tensor_;
};

}  // namespace

HostMemoryRef tensor_memory(PyObject* object) {
  return HostMemoryRef::adopt(new TensorMemory(THPVariable_Unpack(object)));
}

PyObject* wrap_host_tensor(HostTensor& tensor) {
  if (tensor.in_place) Py_RETURN_NONE;
  return wrap_host_memory(*tensor.info, tensor.file->path(), tensor.data, tensor.memory);
}

PyObject* wrap_host_memory(const TensorInfo& info, const std::string& path, char* start, const HostMemoryRef& memory) {
  const TensorMeta meta = torch_meta(info, path);
  c10::DataPtr data(nullptr, c10::Device(c10::kCPU));
  if (start) {
    memory->retain();
    data = c10::DataPtr(start, memory.get(), &release_memory, c10::Device(c10::kCPU));
  }
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(),
                                                       static_cast<int64_t>(info.bytes.size()), std::move(data),
                                                       /*allocator=*/nullptr, /*resizable=*/false);
  return new_tensor(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), meta, 0);
}

}  // namespace weightload
