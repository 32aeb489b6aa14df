// Ranks as threads of one process, and collectives between them that check what a real group would punish with a hang:
// that all ranks issue the same operations in the same order.
#pragma once
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "group/collective.h"

class FakeGroup {
 public:
  explicit FakeGroup(uint32_t ranks) : ranks_(ranks), issued_(ranks) {}

  std::unique_ptr<weightload::Collective> rank(uint32_t rank) { return std::make_unique<Member>(this, rank); }

  // Operations that some rank has issued and another has not.
  size_t unmatched() {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t count = 0;
    for (const auto& operation : operations_) count += operation->joined < ranks_;
    return count;
  }
  size_t operations() {
    std::lock_guard<std::mutex> lock(mutex_);
    return operations_.size();
  }
  // From now on every wait throws, as after the death of a rank.
  void fail() {
    std::lock_guard<std::mutex> lock(mutex_);
    failed_ = true;
    changed_.notify_all();
  }

 private:
  enum class Kind { gather, broadcast, all_gather };

  struct Operation {
    Kind kind;
    uint32_t root;
    uint32_t joined = 0;
    weightload::Records records;
    std::vector<weightload::Payload> payloads;
  };

  class Waiting final : public weightload::Pending {
   public:
    Waiting(FakeGroup* group, std::shared_ptr<Operation> operation) : group_(group), operation_(std::move(operation)) {}
    bool wait(std::chrono::milliseconds patience) override {
      std::unique_lock<std::mutex> lock(group_->mutex_);
      const auto done = [&] { return operation_->joined == group_->ranks_; };
      group_->changed_.wait_for(lock, patience, [&] { return done() || group_->failed_; });
      if (!done() && group_->failed_)
        throw weightload::Error(weightload::ErrorKind::group, "connection closed by peer");
      return done();
    }
    weightload::Records records() override { return operation_->records; }

   private:
    FakeGroup* group_;
    std::shared_ptr<Operation> operation_;
  };

  class Member final : public weightload::Collective {
   public:
    Member(FakeGroup* group, uint32_t rank) : group_(group), rank_(rank) {}
    uint32_t rank() const override { return rank_; }
    uint32_t ranks() const override { return group_->ranks_; }
    std::unique_ptr<weightload::Pending> gather(const std::string& record) override {
      return group_->join(rank_, Kind::gather, 0, record, {});
    }
    std::unique_ptr<weightload::Pending> broadcast(const weightload::Payload& payload, uint32_t root) override {
      return group_->join(rank_, Kind::broadcast, root, {}, payload);
    }
    std::unique_ptr<weightload::Pending> all_gather(const weightload::Payload& payload) override {
      return group_->join(rank_, Kind::all_gather, 0, {}, payload);
    }

   private:
    FakeGroup* group_;
    uint32_t rank_;
  };

  std::unique_ptr<weightload::Pending> join(uint32_t rank, Kind kind, uint32_t root, const std::string& record,
                                            const weightload::Payload& payload) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t turn = issued_[rank]++;
    if (turn == operations_.size()) {
      operations_.push_back(std::make_shared<Operation>());
      operations_.back()->kind = kind;
      operations_.back()->root = root;
      operations_.back()->records.resize(ranks_);
      operations_.back()->payloads.resize(ranks_);
    }
    const auto operation = operations_[turn];
    CHECK(operation->kind == kind && operation->root == root);
    operation->records[rank] = record;
    operation->payloads[rank] = payload;
    if (++operation->joined == ranks_) {
      if (kind != Kind::gather) move(*operation);
      operation->payloads.clear();
      changed_.notify_all();
    }
    return std::make_unique<Waiting>(this, operation);
  }

  void move(Operation& operation) const {
    const auto& payloads = operation.payloads;
    const uint64_t bytes = payloads.front().bytes;
    const uint64_t stripe = bytes / ranks_;
    for (const auto& payload : payloads) CHECK(payload.bytes == bytes);
    for (uint32_t from = 0; from < ranks_; ++from) {
      if (operation.kind == Kind::broadcast && from != operation.root) continue;
      const uint64_t begin = operation.kind == Kind::broadcast ? 0 : stripe * from;
      const uint64_t size = operation.kind == Kind::broadcast ? bytes : stripe;
      for (uint32_t to = 0; to < ranks_; ++to) {
        if (to != from) std::memcpy(payloads[to].host->data() + begin, payloads[from].host->data() + begin, size);
      }
    }
  }

  const uint32_t ranks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Operation>> operations_;
  std::vector<size_t> issued_;
  bool failed_ = false;
};
