#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/fork_generation.h"
#include "base/stopwatch.h"
#include "group/exchange.h"
#include "group/registry.h"
#include "plan/layout.h"
#include "plan/read_plan.h"

namespace weightload {

// The blocks of a load that travel between the ranks of a group; none where every rank reads for itself.
class SharedBlocks {
 public:
  explicit SharedBlocks(std::shared_ptr<GroupExchange> exchange) : exchange_(std::move(exchange)) {
    if (!exchange_) return;
    reads_.rank = exchange_->rank();
    reads_.ranks = exchange_->ranks();
    reads_.strategy = exchange_->strategy();
  }
  ~SharedBlocks() { leave(); }

  explicit operator bool() const { return exchange_ != nullptr; }

  // What this rank reads.
  ReadPlanOptions reads(uint64_t task_bytes) const {
    ReadPlanOptions options = reads_;
    options.task_bytes = task_bytes;
    return options;
  }

  // Bytes of a block's memory: as it travels.
  uint64_t buffer(uint64_t block_bytes) const { return buffer_bytes(block_bytes, reads_); }

  // Of a bound in bytes of blocks, this rank's part: it reads a stripe of each.
  uint64_t own_part(uint64_t bytes) const {
    return reads_.strategy == Strategy::striped ? bytes / reads_.ranks + 1 : bytes;
  }

  // `prepare` as GroupExchange::Prepare, for blocks of the layout by their number there; empty ones do not travel.
  using Prepare = std::function<bool(uint32_t block, std::chrono::milliseconds patience, Payload& payload)>;
  void begin(const Layout& layout, Prepare prepare, const CheckpointFiles& files) {
    if (!exchange_) return;
    for (uint32_t b = 0; b < layout.blocks.size(); ++b) {
      const bool travels = layout.blocks[b].bytes > 0;
      turn_of_.push_back(travels ? turns_.size() : kStays);
      if (travels) turns_.push_back(b);
    }
    std::vector<std::string> paths;
    for (const auto& file : files) paths.push_back(file->path());
    exchange_->begin(
        turns_.size(),
        [this, prepare = std::move(prepare)](size_t turn, std::chrono::milliseconds patience, Payload& payload) {
          return prepare(turns_[turn], patience, payload);
        },
        std::move(paths));
  }

  // Without communicating.
  bool is_complete(uint32_t block) const {
    return turn_of_[block] == kStays || exchange_->is_complete(turn_of_[block]);
  }

  // See GroupExchange::complete(). Adds the time it takes to `shared_ns`.
  bool complete(uint32_t block, std::chrono::milliseconds patience, std::atomic<uint64_t>& shared_ns) {
    if (is_complete(block)) return true;
    Stopwatch watch(shared_ns);
    return exchange_->complete(turn_of_[block], patience);
  }

  // See GroupExchange::give_reason().
  void give_reason(const Error& error) {
    if (exchange_) exchange_->give_reason(error);
  }

  // In a forked child without a word: the communicator belongs to the parent.
  void leave() noexcept {
    const auto exchange = std::move(exchange_);
    if (!exchange || generation_ != fork_generation() || exchange->awaits_verdict()) return;
    group_registry::leave(exchange);
  }

 private:
  static constexpr size_t kStays = SIZE_MAX;  // of empty blocks

  const uint32_t generation_ = fork_generation();
  ReadPlanOptions reads_;
  std::shared_ptr<GroupExchange> exchange_;
  std::vector<uint32_t> turns_;  // blocks that travel
  std::vector<size_t> turn_of_;  // by block
};

}  // namespace weightload
