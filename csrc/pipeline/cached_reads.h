#pragma once
#include <vector>

#include "memory/host_memory.h"
#include "pipeline/selected_tensors.h"
#include "plan/read_plan.h"

namespace weightload {

// Whether what a load will read is in the page cache; not, where the kernel does not say. `maps` are of its files,
// where they are mapped.

bool all_cached(const SelectedTensors& selected, const std::vector<HostMemoryRef>& maps, const ReadPlan& plan);

// By some samples: asking of every page costs 34 ns a page, a tenth of reading it.
bool looks_cached(const SelectedTensors& selected, const std::vector<HostMemoryRef>& maps, const ReadPlan& plan);

}  // namespace weightload
