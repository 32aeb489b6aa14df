#pragma once
#include <optional>

namespace weightload {

// Whether this kernel tells its host which large blocks of memory are free, and the host takes them away (a virtual
// machine with free page reporting). Fresh huge pages are then brought back while somebody waits, and what is free in
// smaller pieces is still there. By /sys, once.
bool free_pages_are_reported();

// For tests: what that says from now on; nothing: the truth.
void pretend_free_pages_are_reported(std::optional<bool> reported);

}  // namespace weightload
