#pragma once
#include <cstddef>
#include <cstdint>

namespace simulated {

// Page-locked host memory: what was allocated as such, and what was registered.

void* allocate_locked(size_t bytes);  // null: none left, or fail_locked_after() has come
bool free_locked(void* pointer, size_t* bytes);
bool register_locked(void* pointer, size_t bytes);
bool unregister_locked(void* pointer, size_t* bytes);

// Whether all of the bytes are page-locked.
bool is_locked(const void* pointer, size_t bytes);
// Whether the first of them is; its range then.
bool locked_range(const void* pointer, uintptr_t* begin, size_t* bytes);

size_t locked_bytes();
size_t locked_made();                // allocations and registrations so far
void fail_locked_after(long count);  // -1: never

// Of the bytes, to tell whether they have changed.
uint64_t digest(const void* data, size_t bytes);

}  // namespace simulated
