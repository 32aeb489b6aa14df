#pragma once
#include <driver_types.h>

#include "stream.h"

namespace simulated {

// Stream capture, as far as to make what happens to others while one is under way. What is captured is thrown away.

bool is_capturing(const Stream& stream);
// While any stream is captured in global mode, or one in this thread's mode by this thread: some calls are errors, and
// spoil the capture, unless the thread is in relaxed mode.
cudaError_t check_capture();

}  // namespace simulated
