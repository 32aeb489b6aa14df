#pragma once
#include <driver_types.h>

namespace simulated {

// Devices as CUDA_VISIBLE_DEVICES shows them, the threads' current ones, and contexts.

int device_count();
int physical_device(int device);  // what it is without CUDA_VISIBLE_DEVICES
int current_device();             // of the thread
cudaError_t set_current_device(int device);

// Something needs the device: its context is there from now on. The error of a forked child.
cudaError_t use_device(int device);
cudaError_t use_current_device();
bool has_context(int device);

void fill_properties(int device, cudaDeviceProp* properties);
cudaError_t attribute_of(int device, int attribute, int* value);

}  // namespace simulated
