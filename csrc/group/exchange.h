#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "group/collective.h"
#include "plan/read_plan.h"

namespace weightload {

// One load's share of a group's communicator, from the agreement to the last block.
//
// Note [Issue points]
// Every collective is issued by the consumer's own thread, inside the call that begins a load and inside next(), and at
// points that follow from the plan alone: with the first tensor of block b, everything up to block b + 1. A consumer
// may therefore use the same group for collectives of its own between two tensors: all ranks issue all of them in one
// order. A thread of ours would drive the communicator beside the consumer's, in an order of the scheduler's making.
//
// Note [Matched]
// A block is a gather of status records and, if every rank was ready, the collective that moves the block. All ranks
// see the same records, so all go on or all stop: nobody is left waiting in a collective that another will not issue. A
// rank that leaves says so in its next record. It may not go while its last record says `ready` and is not answered:
// then it has promised to take part in what follows.
//
// Note [Verdict]
// Ranks that check the files of a load, each some of them, meet once more behind its last block, or behind the
// agreement where no blocks travel: with a status of the same kind, so that a rank that leaves, or fails, before it has
// checked its files, says that there.
//
// One thread at a time.
class GroupExchange {
 public:
  using Milliseconds = std::chrono::milliseconds;

  // Readies a block: true when this rank's part of it is in place (copies to a device queued), with its memory; false
  // when that takes longer than the patience; throws Error when it will never be.
  using Prepare = std::function<bool(size_t block, Milliseconds patience, Payload& payload)>;

  // `load` names the load in errors: "load of 3 files (first: a.safetensors)".
  GroupExchange(std::unique_ptr<Collective> collective, Strategy strategy, std::string load);
  ~GroupExchange();

  uint32_t rank() const { return rank_; }
  uint32_t ranks() const { return ranks_; }
  Strategy strategy() const { return strategy_; }

  // The agreement: everyone's record to everyone, once, before anything else. Call again, with the same record, until
  // it is true. The ranks have agreed if all records are equal and begin with kAgreed. `more`: blocks will follow.
  //
  // `terms`: how much of the records must be equal, and what comes where the rest is not.
  struct Terms {
    size_t compared = SIZE_MAX;  // bytes from the beginning
    // Empty: the ranks have agreed all the same. Else they have not, but meet once more, at another exchange. A rank
    // that is interrupted, and does not come to that, gives them this record there.
    std::string parting;
    bool verdict = false;  // whether the ranks that have agreed call conclude() in the end, even if nothing travels
  };
  static constexpr char kAgreed = 1;
  bool agree(const std::string& record, bool more, const Terms& terms, Milliseconds patience, Records& records);

  // Blocks that will travel; the same on every rank.
  void begin(size_t blocks, Prepare prepare, std::vector<std::string> paths);

  bool is_complete(size_t block) const { return block < done_; }

  // Brings blocks 0 .. `block` to completion, and the one after it on its way. False when that takes longer than the
  // patience. Throws the error of the rank that failed first (the lowest, of those that failed at one block), on
  // every rank the same, before any rank has got the block that it kept from being complete.
  bool complete(size_t block, Milliseconds patience);

  // Whether nothing but the verdict is to come: who has the exchange for that alone, calls conclude() or leave().
  bool awaits_verdict() const { return terms_.verdict && begun_ && !ended_ && done_ == blocks_ && !failure_; }

  // The verdict, once all blocks are complete: `failure` is this rank's. True when all ranks were content; false when
  // that takes longer than the patience: call again. Throws the error of the lowest rank that has failed.
  bool conclude(const std::optional<Error>& failure, Milliseconds patience);

  // Why this rank will leave, if it does: the others then raise that, and not that it has left.
  void give_reason(const Error& error);

  // Takes no further part: tells the others, and waits up to the patience for them to hear it. False when they may not
  // have, and expect more of this rank: call again, or they are held up until the group's timeout.
  bool leave(Milliseconds patience) noexcept;

  // Nothing more will be issued. From any thread.
  bool ended() const { return ended_; }

 private:
  enum class Stage : uint8_t { idle, agreeing, preparing, asking };

  bool step(Milliseconds patience);
  bool ask(Milliseconds patience);
  void judge(const Records& records);
  bool settle(Milliseconds patience);
  void end() noexcept;
  [[noreturn]] void fail(const Error& error);
  std::string stage_name() const;

  std::unique_ptr<Collective> collective_;
  const Strategy strategy_;
  const std::string load_;
  const uint32_t rank_, ranks_;

  Stage stage_ = Stage::idle;
  Prepare prepare_;
  std::vector<std::string> paths_;  // of the files, for errors: an exchange may outlive the load that had them open
  size_t blocks_ = 0;
  size_t next_ = 0;  // the block whose turn it is
  size_t done_ = 0;  // blocks 0 .. done_ - 1 are complete
  bool more_ = true;
  Terms terms_;
  bool begun_ = false;
  bool concluding_ = false, concluded_ = false;
  bool leaving_ = false;
  std::string parting_;  // the status of a rank that leaves
  std::atomic<bool> ended_{false};
  Payload payload_;                              // of block next_
  std::unique_ptr<Pending> asked_;               // the gather that is on its way
  std::deque<std::unique_ptr<Pending>> moving_;  // blocks done_ .. next_ - 1
  std::optional<Error> failure_;                 // at block next_
};

}  // namespace weightload
