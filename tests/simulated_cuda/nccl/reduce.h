#pragma once
#include <nccl.h>

#include <cstddef>

namespace simulated_nccl {

size_t size_of(ncclDataType_t type);  // 0: not provided

// into = into (op) from, `count` values; `last` with the number of ranks, for an average. False: not provided.
bool reduce(void* into, const void* from, size_t count, ncclDataType_t type, ncclRedOp_t op);
bool finish_reduce(void* into, size_t count, ncclDataType_t type, ncclRedOp_t op, int ranks);

}  // namespace simulated_nccl
