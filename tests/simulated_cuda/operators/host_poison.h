#pragma once

namespace simulated_cuda {

// From now on torch's page-locked memory is poisoned each time it is handed out.
void poison_pinned_memory();

}  // namespace simulated_cuda
