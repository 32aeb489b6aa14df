#pragma once
#include <cstdint>
#include <vector>

#include "plan/tensor_box.h"

// Adds the places in the file of all bytes of a run, in its order.
inline void add_bytes(const weightload::StridedRun& run, std::vector<uint64_t>& bytes) {
  for (uint64_t p = 0; p < run.count; ++p) {
    for (uint64_t byte = 0; byte < run.piece; ++byte) bytes.push_back(run.begin + p * run.stride + byte);
  }
}
