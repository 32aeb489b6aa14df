#pragma once
#include <Python.h>

#include "pipeline/host_loader.h"

namespace weightload {

// A torch.Tensor over the tensor's memory: contiguous, with a storage of exactly its bytes, so that saving
// it, or looking for tensors that share memory, sees nothing of its neighbours. No bytes are copied. Takes
// over `tensor.memory`. New reference. Throws Error{tensor} for dtypes and shapes that torch lacks.
PyObject* wrap_host_tensor(HostTensor& tensor);

}  // namespace weightload
