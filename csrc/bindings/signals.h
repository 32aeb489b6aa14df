#pragma once
#include <pybind11/pybind11.h>

namespace weightload {

// Lets signal handlers run, with or without the GIL; throws what they raise, KeyboardInterrupt for Ctrl-C. Only the
// main thread has them: elsewhere it does nothing.
inline void check_signals() {
  const pybind11::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

}  // namespace weightload
