#pragma once
#include <cstddef>

namespace weightload {

// Whether stream_copy() can do what it is for on this processor.
#if defined(__SSE2__)
inline constexpr bool kCanStream = true;
#else
inline constexpr bool kCanStream = false;
#endif

// Copies to memory past the processor's caches (non-temporal stores): what is written is not read from memory first,
// as a store to a line that no cache holds has it. For megabytes that nobody needs soon, into memory that was not just
// written to: zeros that the kernel has put there are still in a cache.
//
// Memory on which other processors' writes may follow: `from` may change meanwhile, and gives what it had at some time.
// What was written is visible to other threads as after plain stores.
void stream_copy(char* to, const char* from, size_t size) noexcept;

// The same, but for the last sentence: a stream_fence() has to follow the last copy.
void stream_copy_unfenced(char* to, const char* from, size_t size) noexcept;
void stream_fence() noexcept;

}  // namespace weightload
