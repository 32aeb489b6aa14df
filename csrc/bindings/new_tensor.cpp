#include "bindings/new_tensor.h"

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <stdexcept>
#include <utility>

namespace weightload {

PyObject* new_tensor(c10::Storage storage, c10::DispatchKeySet keys, const TensorMeta& meta, int64_t offset) {
  // No operator of torch is called here, so of all that PlainTorch sets aside only this matters; it is for every small
  // tensor, under no_grad too.
  std::optional<c10::InferenceMode> normal;
  if (c10::InferenceMode::is_enabled()) normal.emplace(false);
  at::Tensor result =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, c10::scalarTypeToTypeMeta(meta.dtype));
  result.unsafeGetTensorImpl()->set_sizes_and_strides(meta.sizes, meta.strides, offset);
  PyObject* wrapped = THPVariable_Wrap(std::move(result));
  if (!wrapped) throw std::runtime_error("torch could not wrap a tensor");
  return wrapped;
}

}  // namespace weightload
