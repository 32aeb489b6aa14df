#include "memory/stream_copy.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace weightload {

#if defined(__SSE2__)

namespace {

constexpr size_t kLine = 64;

// The processor's own prefetching ends at each page of 4 KiB.
constexpr size_t kAhead = 1024;

}  // namespace

void stream_copy_unfenced(char* to, const char* from, size_t size) noexcept {
  const size_t head = std::min(size, (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine);
  std::memcpy(to, from, head);
  size_t at = head;
  for (; at + kLine <= size; at += kLine) {
    // May name memory behind the end: it then does nothing.
    _mm_prefetch(from + at + kAhead, _MM_HINT_T0);
    const auto* const source = reinterpret_cast<const __m128i*>(from + at);
    auto* const target = reinterpret_cast<__m128i*>(to + at);
    const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
  }
  std::memcpy(to + at, from + at, size - at);
}

// These stores wait for no release.
void stream_fence() noexcept { _mm_sfence(); }

#else

void stream_copy_unfenced(char* to, const char* from, size_t size) noexcept { std::memcpy(to, from, size); }

void stream_fence() noexcept {}

#endif

void stream_copy(char* to, const char* from, size_t size) noexcept {
  stream_copy_unfenced(to, from, size);
  stream_fence();
}

}  // namespace weightload
