#include "base/fork_generation.h"

#include <pthread.h>

#include <atomic>

namespace weightload {
namespace {

std::atomic<uint32_t> generation{0};

// Registered when the library is loaded, before anything could fork with threads of ours alive.
[[maybe_unused]] const int registered =
    ::pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1, std::memory_order_relaxed); });

}  // namespace

uint32_t fork_generation() { return generation.load(std::memory_order_relaxed); }

}  // namespace weightload
