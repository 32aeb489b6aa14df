#pragma once
#include <pybind11/pybind11.h>

#include "load/load_counts.h"

namespace weightload {

inline double in_seconds(uint64_t nanoseconds) { return static_cast<double>(nanoseconds) * 1e-9; }

// For weightload/_base/load_stats.py. `begun_s` is on the clock of Python's time.monotonic().
pybind11::dict load_counts(const LoadCounts& counts);

}  // namespace weightload
