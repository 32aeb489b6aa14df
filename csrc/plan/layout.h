#pragma once
#include <cstdint>
#include <vector>

#include "base/byte_range.h"
#include "plan/tensor_box.h"

namespace weightload {

// One tensor as the planner sees it.
struct TensorExtent {
  uint32_t file = 0;   // index of its file
  ByteRange bytes;     // in that file
  uint32_t alignment;  // bytes its first byte must be aligned to in memory; a power of two
  // The tensor is a view of the mapped file. Its block is a piece of the mapping, so the block cannot reorder
  // or pad; only tensors that lie aligned in their file can be mapped.
  bool mapped = false;
  // The tensor's memory is there already (a parameter that is loaded into): a block of its own.
  bool alone = false;
  // Of a tensor whose bytes are not contiguous in the file: where they are. `bytes` then begins where they do, and has
  // their number.
  const std::vector<StridedRun>* runs = nullptr;
};

// A run of bytes that is contiguous in a block, and in a file: one read, or one device copy. Or in pieces in the file,
// at equal distances: `bytes` then begins where they do, and has their number.
struct CopyRun {
  uint32_t file = 0;
  ByteRange bytes;  // in the file
  uint32_t block = 0;
  uint64_t block_offset = 0;  // bytes from the block's start
  uint64_t piece = 0;         // bytes; 0: contiguous in the file, too
  uint64_t stride = 0;        // bytes from one piece's beginning to the next one's
};

// A piece of memory that holds neighbouring tensors: a torch allocation, anonymous host memory, or a slice of
// a mapped file.
struct Block {
  uint64_t bytes = 0;
  uint32_t first_tensor = 0;  // tensors [first_tensor, last_tensor)
  uint32_t last_tensor = 0;
  uint32_t first_run = 0;  // runs [first_run, last_run)
  uint32_t last_run = 0;
  bool mapped = false;
};

struct TensorPlace {
  uint32_t block = 0;
  uint64_t block_offset = 0;
};

struct Layout {
  std::vector<Block> blocks;
  std::vector<TensorPlace> places;  // one per tensor, in the order given
  std::vector<CopyRun> runs;        // ordered by block, then by offset; empty tensors have none
};

struct LayoutOptions {
  // Upper bound of a block in bytes, except that a larger tensor gets a block of its own. Large blocks cost
  // memory (a block is held while any of its tensors lives, and a loader holds one or two unfinished ones);
  // small ones cost an allocation, and a collective, each. 64 MiB keeps both under a percent of a load.
  uint64_t block_bytes = 64ull << 20;

  // The alignment every block starts at in memory, and the least alignment of a tensor in `aligned` layouts.
  // 256 is what accelerator kernels and allocators assume; 64 is a host cache line.
  uint64_t block_alignment = 256;

  // Not 0 (host): a block starts as far from a multiple of this as its first byte does in the file, so that it can be
  // read directly, and is larger by as much; so do large tensors behind a gap. A power of two, at least
  // block_alignment.
  uint64_t direct_alignment = 0;

  // True (accelerators): every tensor starts on a multiple of block_alignment, at the cost of padding and of
  // one copy run a tensor. False (host): tensors keep the file's spacing wherever that meets their own
  // alignment, so that thousands of small tensors are one run, read by one call.
  bool align_every_tensor = true;
};

// Assigns tensors, in the order given, to blocks. Pure: no I/O, O(tensors). Tensors of a mapped block are
// contiguous in one file. Empty tensors take no bytes but have a valid place.
Layout plan_layout(const std::vector<TensorExtent>& tensors, const LayoutOptions& options);

}  // namespace weightload
