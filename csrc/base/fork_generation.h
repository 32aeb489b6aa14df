#pragma once
#include <cstdint>

namespace weightload {

// A number that differs between a process and a child it forked: whoever owns threads compares it with the
// number of when they were started. Costs an atomic load, unlike getpid().
uint32_t fork_generation();

}  // namespace weightload
