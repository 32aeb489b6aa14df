#include "bindings/device_tensor.h"

#include <ATen/core/Tensor.h>

#include "bindings/new_tensor.h"
#include "bindings/tensor_meta.h"
#include "device/accelerator.h"

namespace weightload {

PyObject* wrap_device_tensor(DeviceTensor& tensor) {
  if (tensor.in_place) Py_RETURN_NONE;
  const TensorMeta meta = torch_meta(*tensor.info, tensor.file->path());
  const at::Tensor& bytes = block_bytes(*tensor.block);
  const auto offset = static_cast<int64_t>(tensor.block_offset / c10::elementSize(meta.dtype));
  return new_tensor(bytes.storage(), bytes.key_set(), meta, offset);
}

}  // namespace weightload
