#pragma once
#include <cstdint>
#include <vector>

#include "base/byte_range.h"
#include "plan/layout.h"

namespace weightload {

// Which rank of a group reads which bytes of a block.
enum class Strategy : uint8_t {
  independent,  // every rank reads every block
  broadcast,    // the root reads, the others receive
  striped,      // rank r reads the r-th stripe of every block; an all-gather completes it
};

// One read: `bytes` of a file go to `block_offset` of a block. Or so many bytes in pieces at equal distances, the first
// of them where `bytes` begins: each of `piece` bytes, one behind the other in the block.
struct ReadTask {
  uint32_t file = 0;
  ByteRange bytes;
  uint32_t block = 0;
  uint64_t block_offset = 0;
  uint64_t piece = 0;   // bytes; 0: contiguous in the file
  uint64_t stride = 0;  // bytes from one piece's beginning to the next one's

  StridedRun run() const {
    return piece == 0 ? StridedRun{bytes.begin, bytes.size(), bytes.size(), 1}
                      : StridedRun{bytes.begin, piece, stride, bytes.size() / piece};
  }
};

struct ReadPlan {
  std::vector<ReadTask> tasks;       // in the order of the layout's runs: blocks, then offsets
  std::vector<uint32_t> block_ends;  // tasks of block b end at block_ends[b]; they start where b - 1 ends
};

struct ReadPlanOptions {
  uint32_t rank = 0;   // of this process in its group
  uint32_t ranks = 1;  // of the group
  uint32_t root = 0;   // the reader under `broadcast`
  Strategy strategy = Strategy::independent;

  // Reads are cut at multiples of this in the file. Smaller tasks spread a load over the threads more evenly
  // and let the consumer start sooner; larger ones cost fewer system calls and keep readahead going.
  uint64_t task_bytes = 8ull << 20;
};

// A plan of more reads is refused: 128 TiB by tasks of 8 MiB. A plan of as many takes half a gigabyte.
inline constexpr uint64_t kMostReads = 1 << 24;

// Bytes of one rank's stripe of a block: an N-th, rounded up to 256 so that stripes start aligned. An
// all-gather needs equal stripes, so a block's buffer is stripe_bytes * ranks long and its end may be
// padding.
uint64_t stripe_bytes(uint64_t block_bytes, uint32_t ranks);

// Bytes of a block's buffer: the block's, or for `striped` its stripes'.
uint64_t buffer_bytes(uint64_t block_bytes, const ReadPlanOptions& options);

// The part of a block [0, block_bytes) that `rank` reads from files.
ByteRange rank_share(uint64_t block_bytes, const ReadPlanOptions& options);

// The reads of one rank. Over all ranks of a striped group, or on the root of a broadcast, every byte of
// every run is read exactly once. Pure. Throws Error{memory} beyond kMostReads.
ReadPlan plan_reads(const Layout& layout, const ReadPlanOptions& options);

}  // namespace weightload
