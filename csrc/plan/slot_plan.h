#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/byte_range.h"
#include "plan/read_plan.h"

namespace weightload {

// A piece of a slot's bytes that comes from the file in one go and lies in the image where the device wants it.
struct SlotPiece {
  ByteRange bytes;            // in the file
  uint64_t image_offset = 0;  // from the image's start
};

// One host-to-device copy out of a slot's image: the padding between its pieces included.
struct SlotCopy {
  uint64_t image_offset = 0;
  uint64_t bytes = 0;
  uint32_t block = 0;
  uint64_t block_offset = 0;
};

// What one slot of the pinned ring carries: a contiguous range of one file, spread to the places its tensors have on
// the device. The image starts `lead` bytes into the slot, so that the file's and the memory's position agree modulo
// kDirectAlignment, as O_DIRECT demands.
//
// An image is never denser than the file: piece by piece, image_offset >= bytes.begin - task.bytes.begin. Bytes that
// were read in one go, as O_DIRECT needs it, can therefore be spread in place, last piece first.
struct SlotTask {
  uint32_t file = 0;
  ByteRange bytes;  // in the file
  uint64_t lead = 0;
  uint32_t first_piece = 0;  // pieces [first_piece, last_piece)
  uint32_t last_piece = 0;
  uint32_t first_copy = 0;  // copies [first_copy, last_copy); at most one a block
  uint32_t last_copy = 0;
  // Of pieces at equal distances in the file (ReadTask::run): one SlotPiece, of which `bytes` has their number. Nothing
  // else is in the slot.
  StridedRun run{};
};

struct SlotPlan {
  std::vector<SlotTask> tasks;  // in the order of blocks and offsets
  std::vector<SlotPiece> pieces;
  std::vector<SlotCopy> copies;
  std::vector<uint32_t> tasks_of_block;      // how many tasks write to a block
  std::vector<uint32_t> last_task_of_block;  // meaningful where tasks_of_block is not 0
};

// Groups reads, which must have been cut at multiples of slot_bytes (ReadPlanOptions::task_bytes), into slots. Pure.
//
// A gap in the file or a change of files ends a slot. The end of a block does not: tensors that are loaded into memory
// of their own are a block each, and a slot carries hundreds of them.
SlotPlan plan_slots(const std::vector<ReadTask>& reads, size_t blocks, uint64_t slot_bytes);

}  // namespace weightload
