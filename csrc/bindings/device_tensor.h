#pragma once
#include <Python.h>

#include "load/device_loader.h"

namespace weightload {

// A torch.Tensor that shares its block's storage: contiguous, 256-byte aligned, its offset in the storage. The storage
// is the caching allocator's own, so that Tensor.record_stream, which knows memory by its storage, works. None for a
// tensor that was read into memory of the caller's. New reference. Throws Error{tensor} for dtypes and shapes that
// torch lacks.
PyObject* wrap_device_tensor(DeviceTensor& tensor);

}  // namespace weightload
