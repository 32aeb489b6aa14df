#include <algorithm>

#include "plan_rules.h"
#include "require.h"

using namespace weightload;

namespace {

// Ranks' shares of a block follow each other from its start to its end.
void check_shares(const Block& block, ReadPlanOptions options) {
  const uint64_t buffer = buffer_bytes(block.bytes, options);
  REQUIRE(buffer >= block.bytes);
  uint64_t position = 0;
  for (options.rank = 0; options.rank < options.ranks; ++options.rank) {
    const ByteRange share = rank_share(block.bytes, options);
    REQUIRE(share.begin <= share.end && share.end <= block.bytes);
    if (options.strategy == Strategy::independent) {
      REQUIRE((share == ByteRange{0, block.bytes}));
      continue;
    }
    if (share.empty()) continue;
    REQUIRE(share.begin == position);
    position = share.end;
    if (options.strategy == Strategy::broadcast) REQUIRE(options.rank == options.root);
    if (options.strategy == Strategy::striped) REQUIRE(share.begin == buffer / options.ranks * options.rank);
  }
  REQUIRE(options.strategy == Strategy::independent || position == block.bytes);
  if (options.strategy == Strategy::striped) {
    REQUIRE(buffer % options.ranks == 0 && buffer / options.ranks % 256 == 0);
    REQUIRE(buffer - block.bytes < 257ull * options.ranks);
  } else {
    REQUIRE(buffer == block.bytes);
  }
}

// One rank's plan: tasks by block, in order, of bounded size, within the rank's share.
void check_order(const Layout& layout, const ReadPlanOptions& options, const ReadPlan& plan) {
  REQUIRE(plan.block_ends.size() == layout.blocks.size());
  uint32_t next = 0;
  for (uint32_t b = 0; b < layout.blocks.size(); ++b) {
    const ByteRange share = rank_share(layout.blocks[b].bytes, options);
    uint64_t end = share.begin;
    REQUIRE(plan.block_ends[b] >= next && plan.block_ends[b] <= plan.tasks.size());
    for (; next < plan.block_ends[b]; ++next) {
      const ReadTask& task = plan.tasks[next];
      REQUIRE(task.block == b);
      REQUIRE(task.bytes.begin < task.bytes.end);
      REQUIRE(task.bytes.begin / options.task_bytes == (task.bytes.end - 1) / options.task_bytes);
      REQUIRE(task.block_offset >= end);
      end = task.block_offset + task.bytes.size();
      REQUIRE(end <= share.end);
    }
  }
  REQUIRE(next == plan.tasks.size());
}

}  // namespace

void check_reads(const Layout& layout, const ReadPlanOptions& options, const std::vector<ReadPlan>& plans) {
  for (const Block& block : layout.blocks) check_shares(block, options);
  std::vector<ReadTask> tasks;
  for (uint32_t rank = 0; rank < plans.size(); ++rank) {
    ReadPlanOptions own = options;
    own.rank = rank;
    check_order(layout, own, plans[rank]);
    tasks.insert(tasks.end(), plans[rank].tasks.begin(), plans[rank].tasks.end());
  }
  std::sort(tasks.begin(), tasks.end(), [](const ReadTask& a, const ReadTask& b) {
    return a.block != b.block ? a.block < b.block : a.block_offset < b.block_offset;
  });
  // All ranks' tasks together are the runs, cut.
  size_t next = 0;
  for (const CopyRun& run : layout.runs) {
    uint64_t position = run.bytes.begin;
    while (position < run.bytes.end) {
      REQUIRE(next < tasks.size());
      const ReadTask& task = tasks[next++];
      REQUIRE(task.file == run.file && task.block == run.block);
      REQUIRE(task.bytes.begin == position && task.bytes.end <= run.bytes.end);
      REQUIRE(task.block_offset == run.block_offset + (position - run.bytes.begin));
      position = task.bytes.end;
    }
  }
  REQUIRE(next == tasks.size());
}
