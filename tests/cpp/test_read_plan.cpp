#include "plan/read_plan.h"

#include <map>

#include "base/error.h"
#include "check.h"
#include "run_bytes.h"

using namespace weightload;

namespace {

Layout three_blocks() {
  std::vector<TensorExtent> tensors;
  uint64_t position = 100;
  for (uint64_t size : {300u, 4u, 5000u, 1u, 700u, 0u, 256u}) {
    tensors.push_back({0, {position, position + size}, 4, false});
    position += size;
  }
  LayoutOptions options;
  options.block_bytes = 2048;
  return plan_layout(tensors, options);
}

// How often each byte of each block is read by the tasks of one rank.
void count_bytes(const ReadPlan& plan, std::map<std::pair<uint32_t, uint64_t>, int>& counts) {
  for (const ReadTask& task : plan.tasks) {
    for (uint64_t i = 0; i < task.bytes.size(); ++i) ++counts[{task.block, task.block_offset + i}];
  }
}

std::map<std::pair<uint32_t, uint64_t>, int> bytes_of_runs(const Layout& layout) {
  std::map<std::pair<uint32_t, uint64_t>, int> bytes;
  for (const CopyRun& run : layout.runs) {
    for (uint64_t i = 0; i < run.bytes.size(); ++i) bytes[{run.block, run.block_offset + i}] = 1;
  }
  return bytes;
}

// The plan of one rank, in tasks of 1,000 bytes: each byte of each run is read once.
ReadPlan plan_of_thousands(const Layout& layout) {
  ReadPlanOptions options;
  options.task_bytes = 1000;
  const ReadPlan plan = plan_reads(layout, options);
  std::map<std::pair<uint32_t, uint64_t>, int> counts;
  count_bytes(plan, counts);
  CHECK(counts == bytes_of_runs(layout));
  return plan;
}

}  // namespace

TEST(one_rank_reads_every_byte_once_in_order) {
  const Layout layout = three_blocks();
  const ReadPlan plan = plan_of_thousands(layout);
  for (size_t i = 0; i < plan.tasks.size(); ++i) {
    const ReadTask& task = plan.tasks[i];
    CHECK(!task.bytes.empty() && task.bytes.size() <= 1000);
    CHECK(task.bytes.begin / 1000 == (task.bytes.end - 1) / 1000);  // cut at multiples in the file
    if (i > 0) CHECK(task.block > plan.tasks[i - 1].block || task.block_offset > plan.tasks[i - 1].block_offset);
  }
}

TEST(block_ends_delimit_the_blocks_tasks) {
  const Layout layout = three_blocks();
  const ReadPlan plan = plan_reads(layout, {});
  CHECK(plan.block_ends.size() == layout.blocks.size());
  uint32_t begin = 0;
  for (uint32_t b = 0; b < plan.block_ends.size(); ++b) {
    for (uint32_t t = begin; t < plan.block_ends[b]; ++t) CHECK(plan.tasks[t].block == b);
    begin = plan.block_ends[b];
  }
  CHECK(begin == plan.tasks.size());
}

TEST(under_broadcast_only_the_root_reads) {
  const Layout layout = three_blocks();
  for (uint32_t rank = 0; rank < 3; ++rank) {
    ReadPlanOptions options;
    options.rank = rank;
    options.ranks = 3;
    options.root = 1;
    options.strategy = Strategy::broadcast;
    std::map<std::pair<uint32_t, uint64_t>, int> counts;
    count_bytes(plan_reads(layout, options), counts);
    CHECK(rank == 1 ? counts == bytes_of_runs(layout) : counts.empty());
  }
}

TEST(stripes_cover_every_byte_once_for_any_number_of_ranks) {
  const Layout layout = three_blocks();
  for (uint32_t ranks = 1; ranks <= 40; ++ranks) {
    std::map<std::pair<uint32_t, uint64_t>, int> counts;
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      ReadPlanOptions options;
      options.rank = rank;
      options.ranks = ranks;
      options.strategy = Strategy::striped;
      options.task_bytes = 777;
      const ReadPlan plan = plan_reads(layout, options);
      count_bytes(plan, counts);
      for (const ReadTask& task : plan.tasks) {
        const uint64_t stripe = stripe_bytes(layout.blocks[task.block].bytes, ranks);
        CHECK(task.block_offset >= stripe * rank && task.block_offset + task.bytes.size() <= stripe * (rank + 1));
      }
    }
    CHECK(counts == bytes_of_runs(layout));
  }
}

TEST(stripes_are_equal_aligned_and_long_enough) {
  for (uint64_t bytes : {0ull, 1ull, 255ull, 256ull, 257ull, 1ull << 40}) {
    for (uint32_t ranks = 1; ranks < 20; ++ranks) {
      const uint64_t stripe = stripe_bytes(bytes, ranks);
      CHECK(stripe % 256 == 0 && stripe * ranks >= bytes);
      CHECK(stripe * ranks < bytes + 256ull * ranks + ranks);
    }
  }
}

TEST(a_plan_that_would_take_all_memory_is_refused_on_every_rank) {
  const auto layout_of = [](uint64_t bytes, uint64_t count) {
    std::vector<TensorExtent> tensors;
    for (uint64_t i = 0; i < count; ++i) tensors.push_back({0, {i * bytes, (i + 1) * bytes}, 1});
    return plan_layout(tensors, {});
  };
  ReadPlanOptions options;
  options.ranks = 1000;
  for (const Strategy strategy : {Strategy::independent, Strategy::broadcast, Strategy::striped}) {
    options.strategy = strategy;
    options.rank = 999;
    for (const auto& [bytes, count] : {std::pair(1ull << 60, 7ull), std::pair(1ull << 47, 1ull)}) {
      const Layout layout = layout_of(bytes, count);
      CHECK_THROWS(plan_reads(layout, options), Error, error.kind == ErrorKind::memory);
    }
    CHECK(plan_reads(layout_of(1ull << 40, 8), options).block_ends.size() == 8);
  }
}

TEST(pieces_are_read_in_tasks_of_several_and_large_ones_in_several_tasks) {
  for (const uint64_t piece : {10u, 300u, 1000u, 2500u}) {
    const std::vector<StridedRun> runs{{100, piece, piece + 50, 7}, {90000, 40, 40, 1}};
    TensorExtent tensor{0, {100, 100 + 7 * piece + 40}, 4, false};
    tensor.runs = &runs;
    const Layout layout = plan_layout({{0, {20, 30}, 1, false}, tensor, {0, {95000, 95010}, 1, false}}, {});
    const ReadPlan plan = plan_of_thousands(layout);
    std::vector<uint64_t> from_file;
    for (const ReadTask& task : plan.tasks) {
      CHECK(task.bytes.size() <= 1000 && task.run().bytes() == task.bytes.size());
      if (task.block_offset < layout.places[1].block_offset) continue;
      if (task.bytes.begin >= 95000) continue;
      add_bytes(task.run(), from_file);
    }
    std::vector<uint64_t> expected;
    for (const StridedRun& run : runs) add_bytes(run, expected);
    CHECK(from_file == expected);
  }
}

TEST(stripes_of_pieces_are_where_the_run_says) {
  for (const uint64_t piece : {10u, 300u, 1000u, 2500u}) {
    const std::vector<StridedRun> runs{{100, piece, piece + 50, 7}, {90000, 40, 40, 1}};
    TensorExtent tensor{0, {100, 100 + 7 * piece + 40}, 1, false};
    tensor.runs = &runs;
    const Layout layout = plan_layout({tensor}, {});
    std::vector<uint64_t> expected;
    for (const StridedRun& run : runs) add_bytes(run, expected);
    for (const uint32_t ranks : {1u, 2u, 3u, 7u}) {
      std::vector<uint64_t> from_file;
      for (uint32_t rank = 0; rank < ranks; ++rank) {
        ReadPlanOptions options;
        options.rank = rank;
        options.ranks = ranks;
        options.strategy = Strategy::striped;
        options.task_bytes = 1000;
        for (const ReadTask& task : plan_reads(layout, options).tasks) {
          CHECK(task.bytes.size() <= 1000 && task.block_offset == from_file.size());
          add_bytes(task.run(), from_file);
        }
      }
      CHECK(from_file == expected);
    }
  }
}
