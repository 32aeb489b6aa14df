#pragma once
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../runtime/control.h"
#include "wire.h"

namespace simulated_nccl {

enum class Kind : uint32_t {
  broadcast,
  all_gather,
  all_reduce,
  reduce,
  reduce_scatter,
  send,
  receive,
  all_to_all,
  gather,
  scatter
};

// One call, as it was made.
struct Operation {
  Kind kind;
  const void* from;
  void* to;
  size_t count;
  ncclDataType_t type;
  ncclRedOp_t op;
  int peer;  // or the root
  cudaStream_t stream;
};

// A rank of a communicator. Its operations run in the order of the calls, on the streams of the calls.
class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  Communicator(std::string name, int rank, int ranks);
  ~Communicator();

  // Queues the operations of a group as one.
  ncclResult_t issue(const std::vector<Operation>& operations);

  std::shared_ptr<Communicator> split(int color, int key);  // null for those without a color
  void abort();
  ncclResult_t error() const { return error_; }

  const int rank, ranks;
  const int device;

 private:
  struct Task;
  void plan(const Operation& operation, Task& task);
  void run(Task& task);
  void move(Task& task);

  const std::string name_;
  Wire payload_, talk_;
  std::mutex mutex_;
  simulated_cuda_clock* const last_;
  uint64_t issued_ = 0, splits_ = 0;
  // Operations run in the order of the calls, whatever streams they are on, as NCCL sees to with events of its own.
  std::mutex turn_;
  std::condition_variable next_;
  uint64_t queued_ = 0, done_ = 0;
  std::atomic<ncclResult_t> error_{ncclSuccess};
};

std::string last_reason();  // why a communicator of this process broke; empty: none did

ncclUniqueId new_id();
std::string text_of(const ncclUniqueId& id);

}  // namespace simulated_nccl
