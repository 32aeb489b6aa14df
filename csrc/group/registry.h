#pragma once
#include <chrono>
#include <memory>

#include "group/exchange.h"

namespace weightload {

// What loads of this process use which group: one load a group at a time, because a communicator's operations are
// matched by their order alone.
//
// A load that was stopped while other ranks were late may still owe them its part of what it promised (see Note
// [Matched]). It is finished by a thread that this registry owns, until the others have heard, a new load on the group
// needs it, or the process ends.
namespace group_registry {

// A new load on the group. Throws Error{usage} while another one is going on.
void claim(const void* group, const std::shared_ptr<GroupExchange>& exchange);

// Leaves, in the background if it must.
void leave(const std::shared_ptr<GroupExchange>& exchange) noexcept;

// True when nothing is owed to the group any more.
bool settled(const void* group, std::chrono::milliseconds patience);

// Stops and joins the threads; for the interpreter's exit.
void abandon() noexcept;

}  // namespace group_registry
}  // namespace weightload
