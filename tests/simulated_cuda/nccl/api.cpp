// NCCL's calls.
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "communicator.h"

using namespace simulated_nccl;

namespace {

using CommRef = std::shared_ptr<Communicator>;

std::mutex mutex;
std::map<ncclComm_t, CommRef>& communicators() {
  static auto* const one = new std::map<ncclComm_t, CommRef>;
  return *one;
}
thread_local std::string last_error;
thread_local int depth = 0;
thread_local std::vector<std::pair<CommRef, Operation>> grouped;

ncclResult_t failed(ncclResult_t result, std::string why) {
  last_error = std::move(why);
  return result;
}

CommRef find(ncclComm_t handle) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = communicators().find(handle);
  return found == communicators().end() ? nullptr : found->second;
}

CommRef drop(ncclComm_t handle) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = communicators().find(handle);
  if (found == communicators().end()) return nullptr;
  CommRef dropped = std::move(found->second);
  communicators().erase(found);
  return dropped;
}

ncclComm_t keep(CommRef communicator) {
  const auto handle = reinterpret_cast<ncclComm_t>(communicator.get());
  std::lock_guard<std::mutex> lock(mutex);
  communicators()[handle] = std::move(communicator);
  return handle;
}

ncclResult_t run_group() {
  ncclResult_t result = ncclSuccess;
  auto mine = std::exchange(grouped, {});
  while (!mine.empty()) {
    const CommRef first = mine.front().first;
    std::vector<Operation> operations;
    std::vector<std::pair<CommRef, Operation>> rest;
    for (auto& one : mine) {
      if (one.first == first)
        operations.push_back(one.second);
      else
        rest.push_back(one);
    }
    if (const ncclResult_t error = first->issue(operations); error != ncclSuccess) result = error;
    mine = std::move(rest);
  }
  return result == ncclSuccess ? result : failed(result, "the simulated NCCL refuses the operation");
}

ncclResult_t add(ncclComm_t handle, const Operation& operation) {
  CommRef communicator = find(handle);
  if (!communicator) return failed(ncclInvalidArgument, "no such communicator");
  grouped.emplace_back(std::move(communicator), operation);
  return depth == 0 ? run_group() : ncclSuccess;
}

ncclResult_t make(ncclComm_t* handle, const std::string& name, int rank, int ranks) {
  try {
    *handle = keep(std::make_shared<Communicator>(name, rank, ranks));
    return ncclSuccess;
  } catch (const std::runtime_error& error) {
    return failed(ncclSystemError, error.what());
  }
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess: return "no error";
    case ncclUnhandledCudaError: return "unhandled cuda error";
    case ncclSystemError: return "unhandled system error";
    case ncclInternalError: return "internal error";
    case ncclInvalidArgument: return "invalid argument";
    case ncclInvalidUsage: return "invalid usage";
    case ncclRemoteError: return "remote process exited or there was a network error";
    case ncclInProgress: return "NCCL operation in progress";
    default: return "unknown result code";
  }
}

// torch asks without a communicator, in another thread than the one that failed.
const char* ncclGetLastError(ncclComm_t) {
  if (std::string why = last_reason(); !why.empty()) last_error = std::move(why);
  return last_error.c_str();
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  *id = new_id();
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
  return make(comm, text_of(id), rank, ranks);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t*) {
  return make(comm, text_of(id), rank, ranks);
}

ncclResult_t ncclCommInitRankScalable(ncclComm_t* comm, int ranks, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
  return make(comm, text_of(ids[0]), rank, ranks);
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* made, ncclConfig_t*) {
  const CommRef communicator = find(comm);
  if (!communicator) return failed(ncclInvalidArgument, "no such communicator");
  try {
    CommRef part = communicator->split(color, key);
    *made = part ? keep(std::move(part)) : nullptr;
    return ncclSuccess;
  } catch (const std::runtime_error& error) {
    return failed(ncclSystemError, error.what());
  }
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) { return find(comm) ? ncclSuccess : ncclInvalidArgument; }

// What it was told to do is done; its connections end with its last operation.
ncclResult_t ncclCommDestroy(ncclComm_t comm) { return drop(comm) ? ncclSuccess : ncclInvalidArgument; }

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  const CommRef communicator = drop(comm);
  if (!communicator) return ncclInvalidArgument;
  communicator->abort();
  return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  const CommRef communicator = find(comm);
  if (!communicator) return ncclInvalidArgument;
  *error = communicator->error();
  return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  const CommRef communicator = find(comm);
  if (!communicator) return ncclInvalidArgument;
  *count = communicator->ranks;
  return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  const CommRef communicator = find(comm);
  if (!communicator) return ncclInvalidArgument;
  *rank = communicator->rank;
  return ncclSuccess;
}

ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int* device) {
  const CommRef communicator = find(comm);
  if (!communicator) return ncclInvalidArgument;
  *device = communicator->device;
  return ncclSuccess;
}

ncclResult_t ncclCommRegister(const ncclComm_t, void*, size_t, void** handle) {
  *handle = nullptr;
  return ncclSuccess;
}

ncclResult_t ncclCommDeregister(const ncclComm_t, void*) { return ncclSuccess; }

ncclResult_t ncclMemAlloc(void** pointer, size_t bytes) {
  return cudaMalloc(pointer, bytes) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

ncclResult_t ncclMemFree(void* pointer) {
  return cudaFree(pointer) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}

ncclResult_t ncclGroupStart() {
  ++depth;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
  if (depth == 0) return failed(ncclInvalidUsage, "no group was begun");
  return --depth == 0 ? run_group() : ncclSuccess;
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return add(comm, {Kind::broadcast, from, to, count, type, ncclSum, root, stream});
}

ncclResult_t ncclBcast(void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                       cudaStream_t stream) {
  return ncclBroadcast(buffer, buffer, count, type, root, comm, stream);
}

ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  return add(comm, {Kind::all_gather, from, to, count, type, ncclSum, 0, stream});
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  return add(comm, {Kind::all_reduce, from, to, count, type, op, 0, stream});
}

ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t stream) {
  return add(comm, {Kind::reduce, from, to, count, type, op, root, stream});
}

ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
  return add(comm, {Kind::reduce_scatter, from, to, count, type, op, 0, stream});
}

ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return add(comm, {Kind::send, from, nullptr, count, type, ncclSum, peer, stream});
}

ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return add(comm, {Kind::receive, nullptr, to, count, type, ncclSum, peer, stream});
}

ncclResult_t ncclAlltoAll(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                          cudaStream_t stream) {
  return add(comm, {Kind::all_to_all, from, to, count, type, ncclSum, 0, stream});
}

ncclResult_t ncclGather(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                        cudaStream_t stream) {
  return add(comm, {Kind::gather, from, to, count, type, ncclSum, root, stream});
}

ncclResult_t ncclScatter(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                         cudaStream_t stream) {
  return add(comm, {Kind::scatter, from, to, count, type, ncclSum, root, stream});
}
}
