#pragma once
#include <pthread.h>

namespace weightload {

// What debuggers, profilers and top call the threads of this library.
inline void name_this_thread() { ::pthread_setname_np(::pthread_self(), "weightload"); }

}  // namespace weightload
