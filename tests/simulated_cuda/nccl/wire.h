#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

namespace simulated_nccl {

// What travels before the bytes of a transfer, so that two that do not belong together are found out.
struct Label {
  uint32_t kind = 0, root = 0, type = 0, op = 0;
  uint64_t number = 0;  // of the communicator's operations; 0 for sends and receives
  uint64_t bytes = 0;
  bool operator==(const Label& other) const {
    return kind == other.kind && root == other.root && type == other.type && op == other.op && number == other.number &&
           bytes == other.bytes;
  }
};

struct Transfer {
  int peer = 0;
  bool out = false;
  char* data = nullptr;
  Label label;
};

enum class Outcome { done, aborted, lost, mismatch };

// Connections to all other ranks, by Unix sockets in the abstract name space.
class Wire {
 public:
  // Waits for the other ranks; throws std::runtime_error when they do not come in time.
  Wire(const std::string& name, int rank, int ranks);
  ~Wire();
  Wire(const Wire&) = delete;

  // All of them at once, those to one peer in order, those from one peer in order. Ends early when abort() is called;
  // when a peer has gone, only if `lost_ends`: else as the kernels of NCCL do that wait for memory to change.
  Outcome run(const std::vector<Transfer>& transfers, bool lost_ends, std::string* why);

  // Everybody's value, by rank; for the communicator's own talk, from one thread.
  std::vector<int64_t> exchange(const std::vector<int64_t>& mine);

  void abort();
  void wait_for_abort();
  bool aborted() const { return aborted_; }

 private:
  const int rank_, ranks_;
  std::vector<int> sockets_;
  int wake_ = -1;
  std::atomic<bool> aborted_{false};
};

}  // namespace simulated_nccl
