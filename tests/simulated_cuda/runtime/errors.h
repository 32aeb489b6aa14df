#pragma once
#include <driver_types.h>

namespace simulated {

// The thread's last error is what the call returns, if it is one.
cudaError_t finish(cudaError_t error);
cudaError_t last_error(bool forget);

// For the calls that the simulation lacks: told on stderr, and an error.
cudaError_t unprovided(const char* name);

// Calls that a capture forbids: an error while one is under way. See capture.h.
cudaError_t check_capture();

}  // namespace simulated

// Every call that needs the current device begins so.
#define USE_DEVICE() \
  if (const cudaError_t why = simulated::use_current_device(); why != cudaSuccess) return finish(why)
// Every call that a capture forbids begins so.
#define NOT_IN_CAPTURE() \
  if (const cudaError_t why = simulated::check_capture(); why != cudaSuccess) return finish(why)
