#pragma once
#include <Python.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/Storage.h>

#include <cstdint>

#include "bindings/tensor_meta.h"

namespace weightload {

// A torch.Tensor over a storage, from its element `offset` on, with the keys of its backend. Whatever the caller's
// modes, it is no inference tensor. New reference.
PyObject* new_tensor(c10::Storage storage, c10::DispatchKeySet keys, const TensorMeta& meta, int64_t offset);

}  // namespace weightload
