#pragma once
#include <Python.h>

#include "load/host_loader.h"

namespace weightload {

// A torch.Tensor over the tensor's memory: contiguous, with a storage of exactly its bytes, so that saving
// it, or looking for tensors that share memory, sees nothing of its neighbours. No bytes are copied. Takes
// over `tensor.memory`. New reference. Throws Error{tensor} for dtypes and shapes that torch lacks.
// None for a tensor that was read in place.
PyObject* wrap_host_tensor(HostTensor& tensor);

// The same for memory that is not a loader's; `start` is null for an empty tensor. `path` serves the message.
PyObject* wrap_host_memory(const TensorInfo& info, const std::string& path, char* start, const HostMemoryRef& memory);

// The memory of a contiguous torch.Tensor on the CPU, to read into; keeps the tensor.
HostMemoryRef tensor_memory(PyObject* tensor);

}  // namespace weightload
