#pragma once
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "memory/host_memory.h"
#include "pipeline/selected_tensors.h"
#include "plan/read_plan.h"

namespace weightload {

// Whether what a load will read is in the page cache. `maps` are of its files, where they are mapped.

// All of it; nothing where the kernel does not say.
std::optional<bool> all_cached(const SelectedTensors& selected, const std::vector<HostMemoryRef>& maps,
                               const ReadPlan& plan);

// By some samples: asking of every page costs 34 ns a page, a tenth of reading it. Not, where it cannot be told.
bool looks_cached(const SelectedTensors& selected, const std::vector<HostMemoryRef>& maps, const ReadPlan& plan);

// Of files that are not open yet, by samples of at most four of them: which memory a load prepares is decided before
// its headers are read. Not, where one cannot be opened; opening it for the load will say why. `pause` as File::open.
bool look_cached(const std::vector<std::string>& paths, const std::function<void()>& pause);

}  // namespace weightload
