#pragma once
#include <optional>
#include <vector>

#include "checkpoint/selected_tensors.h"
#include "plan/read_plan.h"

namespace weightload {

// Whether what a load will read is in the page cache. `maps`: where each of its files is mapped, or null.

// All of it; nothing where the kernel does not say.
std::optional<bool> all_cached(const SelectedTensors& selected, const std::vector<char*>& maps, const ReadPlan& plan);

// Judges by a few samples: asking for every page costs 34 ns a page, a tenth of reading it. False where the kernel does
// not say.
bool looks_cached(const SelectedTensors& selected, const std::vector<char*>& maps, const ReadPlan& plan);

}  // namespace weightload
