#pragma once
#include <functional>

namespace weightload {

// Looked at between the pieces of work that may take long: throws to end it. Python's signals get their turn there, or
// a thread finds that its load has been stopped.
using Look = std::function<void()>;

inline void no_look() {}

}  // namespace weightload
