#include "plan/read_plan.h"

#include <algorithm>
#include <string>

#include "base/error.h"

namespace weightload {
namespace {

constexpr uint64_t kStripeAlignment = 256;

// Sparse files cost nothing to make and may be as long as the kernel counts: planning must not take all memory for what
// cannot be loaded in any case. By the layout, so that all ranks of a group come to the same answer.
void refuse_too_many(const Layout& layout, uint64_t task_bytes) {
  uint64_t reads = 0;
  for (const CopyRun& run : layout.runs) {
    reads += 1 + run.bytes.size() / task_bytes;
    if (reads <= kMostReads) continue;
    throw Error(ErrorKind::memory, "cannot plan the load: it would take more than " + std::to_string(kMostReads) +
                                       " reads of " + std::to_string(task_bytes) + " bytes");
  }
}

// Cuts the part of `run` that lies in `share` (offsets in the block) into tasks.
void add_tasks(const CopyRun& run, ByteRange share, uint64_t task_bytes, std::vector<ReadTask>& tasks) {
  const ByteRange in_block{run.block_offset, run.block_offset + run.bytes.size()};
  const uint64_t begin = std::max(in_block.begin, share.begin);
  const uint64_t end = std::min(in_block.end, share.end);
  if (begin >= end) return;
  uint64_t position = run.bytes.begin + (begin - in_block.begin);
  const uint64_t stop = run.bytes.begin + (end - in_block.begin);
  while (position < stop) {
    const uint64_t cut = std::min(stop, (position / task_bytes + 1) * task_bytes);
    tasks.push_back({run.file, {position, cut}, run.block, run.block_offset + (position - run.bytes.begin), 0, 0});
    position = cut;
  }
}

// Cuts the part of a run of pieces that lies in `share` into tasks: between pieces, but for those of a task or more and
// those that the share cuts, which are reads of their own.
void add_pieces(const CopyRun& run, ByteRange share, uint64_t task_bytes, std::vector<ReadTask>& tasks) {
  const ByteRange in_block{run.block_offset, run.block_offset + run.bytes.size()};
  const uint64_t end = std::min(in_block.end, share.end);
  for (uint64_t at = std::max(in_block.begin, share.begin); at < end;) {
    const uint64_t p = (at - in_block.begin) / run.piece;
    const ByteRange piece{in_block.begin + p * run.piece, in_block.begin + (p + 1) * run.piece};
    const uint64_t in_file = run.bytes.begin + p * run.stride;
    const uint64_t whole = at == piece.begin ? std::min((end - at) / run.piece, task_bytes / run.piece) : 0;
    if (whole > 0 && run.piece < task_bytes) {
      const uint64_t bytes = whole * run.piece;
      tasks.push_back({run.file, {in_file, in_file + bytes}, run.block, at, run.piece, run.stride});
      at += bytes;
      continue;
    }
    add_tasks({run.file, {in_file, in_file + run.piece}, run.block, piece.begin, 0, 0}, {at, std::min(end, piece.end)},
              task_bytes, tasks);
    at = std::min(end, piece.end);
  }
}

}  // namespace

uint64_t stripe_bytes(uint64_t block_bytes, uint32_t ranks) {
  return round_up((block_bytes + ranks - 1) / ranks, kStripeAlignment);
}

uint64_t buffer_bytes(uint64_t block_bytes, const ReadPlanOptions& options) {
  if (options.strategy != Strategy::striped) return block_bytes;
  return stripe_bytes(block_bytes, options.ranks) * options.ranks;
}

ByteRange rank_share(uint64_t block_bytes, const ReadPlanOptions& options) {
  switch (options.strategy) {
    case Strategy::independent: return {0, block_bytes};
    case Strategy::broadcast: return {0, options.rank == options.root ? block_bytes : 0};
    case Strategy::striped: {
      const uint64_t stripe = stripe_bytes(block_bytes, options.ranks);
      return {std::min(block_bytes, stripe * options.rank), std::min(block_bytes, stripe * (options.rank + 1))};
    }
  }
  return {0, 0};
}

ReadPlan plan_reads(const Layout& layout, const ReadPlanOptions& options) {
  refuse_too_many(layout, options.task_bytes);
  ReadPlan plan;
  plan.block_ends.reserve(layout.blocks.size());
  for (const Block& block : layout.blocks) {
    const ByteRange share = rank_share(block.bytes, options);
    for (uint32_t r = block.first_run; r < block.last_run; ++r) {
      const CopyRun& run = layout.runs[r];
      if (run.piece != 0) {
        add_pieces(run, share, options.task_bytes, plan.tasks);
      } else {
        add_tasks(run, share, options.task_bytes, plan.tasks);
      }
    }
    plan.block_ends.push_back(static_cast<uint32_t>(plan.tasks.size()));
  }
  return plan;
}

}  // namespace weightload
