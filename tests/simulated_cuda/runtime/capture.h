#pragma once
#include <driver_types.h>

#include "stream.h"

namespace simulated {

// Stream capture, as far as to make what happens to others while one is under way. What is captured is thrown away.

bool is_capturing(const Stream& stream);
unsigned long long capture_of(const Stream& stream);  // its number; 0: none
// The stream was made to wait for a captured event: what it gets from now on is captured, too.
void join_capture(const Stream& stream, unsigned long long capture);
void spoil_capture(unsigned long long capture);
// While any stream is captured in global mode, or one in this thread's mode by this thread: some calls are errors, and
// spoil the capture, unless the thread is in relaxed mode.
cudaError_t check_capture();

}  // namespace simulated
