#pragma once
#include <pybind11/pybind11.h>

#include <chrono>

#include "bindings/gil.h"

namespace weightload {

// How long a wait lasts before Python's signal handlers get their turn: Ctrl-C is felt within this.
inline constexpr std::chrono::milliseconds kSignalInterval{100};

// Lets signal handlers run; throws what they raise, KeyboardInterrupt for Ctrl-C. Only the main thread has them:
// elsewhere it does nothing. A few nanoseconds where no signal came. With the GIL held.
inline void run_signal_handlers() {
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

// The same with or without the GIL, for those who wait or read: throws at the interpreter's exit, too.
inline void check_signals() {
  const pybind11::gil_scoped_acquire acquire;
  if (interpreter_is_ending()) fail_at_exit();
  run_signal_handlers();
}

}  // namespace weightload
