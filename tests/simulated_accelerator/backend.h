#pragma once
#include <c10/core/Allocator.h>

#include "memory.h"

namespace simulated {

c10::Allocator* device_allocator();  // on the current device and its current stream
int current_device();
int64_t current_stream(int device);
void set_available(bool available);
bool is_available();
bool has_context(int device);  // whether this process has used the device

// The chunk behind a pointer that device_allocator() made; null for others.
DeviceChunk* chunk_of(const c10::DataPtr& data);

}  // namespace simulated
