#pragma once
#include <driver_types.h>

#include "stream.h"

namespace simulated {

// Note [Copies]
// From page-locked memory a copy reads when it runs: a digest taken when it is queued tells whether somebody wrote
// there in between. From pageable memory it reads before the call returns, and to pageable memory it has written by
// then. To page-locked memory it writes when it runs: until then the bytes there are poison, unless other work still
// needs them.
//
// Rows of `width` bytes; one row is a plain copy.
struct Copy {
  void* to = nullptr;
  const void* from = nullptr;
  size_t width = 0, height = 1, to_pitch = 0, from_pitch = 0;
  cudaMemcpyKind kind = cudaMemcpyDefault;
};
cudaError_t copy(const Copy& copy, const StreamRef& stream, bool host_waits);
cudaError_t set(void* to, int value, size_t bytes, const StreamRef& stream, const char* what);

}  // namespace simulated
