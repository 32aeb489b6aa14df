#include "bindings/device_tensor.h"

#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <stdexcept>
#include <utility>

#include "bindings/tensor_meta.h"
#include "device/accelerator.h"

namespace weightload {

PyObject* wrap_device_tensor(DeviceTensor& tensor) {
  if (tensor.in_place) Py_RETURN_NONE;
  const TensorMeta meta = torch_meta(*tensor.info, tensor.file->path());
  const at::Tensor& bytes = block_bytes(*tensor.block);
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(bytes.storage()), bytes.key_set(),
                                                               c10::scalarTypeToTypeMeta(meta.dtype));
  const auto offset = static_cast<int64_t>(tensor.block_offset / c10::elementSize(meta.dtype));
  result.unsafeGetTensorImpl()->set_sizes_and_strides(meta.sizes, meta.strides, offset);
  PyObject* wrapped = THPVariable_Wrap(std::move(result));
  if (!wrapped) throw std::runtime_error("torch could not wrap a tensor");
  return wrapped;
}

}  // namespace weightload
