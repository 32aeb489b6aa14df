#include "plan_rules.h"
#include "require.h"

using namespace weightload;

namespace {

class SlotRules {
 public:
  SlotRules(const Layout& layout, const std::vector<ReadTask>& reads, uint64_t slot_bytes, const SlotPlan& plan)
      : layout_(layout),
        reads_(reads),
        slot_bytes_(slot_bytes),
        plan_(plan),
        written_(layout.blocks.size()),
        tasks_of_block_(layout.blocks.size()) {}

  void check() {
    REQUIRE(plan_.pieces.size() == reads_.size());
    REQUIRE(plan_.tasks_of_block.size() == layout_.blocks.size());
    REQUIRE(plan_.last_task_of_block.size() == layout_.blocks.size());
    for (uint32_t t = 0; t < plan_.tasks.size(); ++t) task(t);
    REQUIRE(next_piece_ == plan_.pieces.size());
    REQUIRE(next_copy_ == plan_.copies.size());
    REQUIRE(tasks_of_block_ == plan_.tasks_of_block);
  }

 private:
  void task(uint32_t number) {
    const SlotTask& task = plan_.tasks[number];
    REQUIRE(task.first_piece == next_piece_ && task.last_piece > task.first_piece);
    REQUIRE(task.first_copy == next_copy_ && task.last_copy > task.first_copy);
    REQUIRE(task.last_piece <= plan_.pieces.size() && task.last_copy <= plan_.copies.size());
    // A direct read of whole blocks around the range fits into the slot.
    REQUIRE(task.lead == task.bytes.begin % kDirectAlignment);
    REQUIRE(round_up(task.bytes.end, kDirectAlignment) - (task.bytes.begin - task.lead) <= slot_bytes_);
    uint64_t position = task.bytes.begin, image_end = 0;
    for (uint32_t c = task.first_copy; c < task.last_copy; ++c, ++next_copy_) {
      const SlotCopy& copy = plan_.copies[c];
      REQUIRE(copy.image_offset >= image_end && copy.image_offset % 64 == 0);
      if (c > task.first_copy) REQUIRE(copy.block > plan_.copies[c - 1].block);  // at most one a block
      pieces(task, copy, position);
      image_end = copy.image_offset + copy.bytes;
      REQUIRE(task.lead + image_end <= slot_bytes_);
      write(number, copy);
    }
    REQUIRE(next_piece_ == task.last_piece);
    REQUIRE(position == task.bytes.end);
  }

  // A copy's pieces: the reads of its block, in order. It begins with the first and ends with the last.
  void pieces(const SlotTask& task, const SlotCopy& copy, uint64_t& position) {
    const uint64_t copy_end = copy.image_offset + copy.bytes;
    uint64_t end = copy.image_offset;
    for (bool first = true; next_piece_ < task.last_piece; first = false, ++next_piece_) {
      const SlotPiece& piece = plan_.pieces[next_piece_];
      const ReadTask& read = reads_[next_piece_];
      if (read.block != copy.block) break;
      REQUIRE(read.file == task.file && read.bytes == piece.bytes);
      REQUIRE(piece.bytes.begin == position);
      position = piece.bytes.end;
      if (first) REQUIRE(piece.image_offset == copy.image_offset);
      REQUIRE(piece.image_offset >= end);
      REQUIRE(piece.image_offset >= piece.bytes.begin - task.bytes.begin);  // spread in place, never to the left
      REQUIRE(copy.block_offset + (piece.image_offset - copy.image_offset) == read.block_offset);
      end = piece.image_offset + piece.bytes.size();
      REQUIRE(end <= copy_end);
    }
    REQUIRE(end == copy_end);
  }

  // Copies carry padding too, which must not fall on what an earlier one has written.
  void write(uint32_t task, const SlotCopy& copy) {
    REQUIRE(copy.block < layout_.blocks.size());
    REQUIRE(copy.block_offset >= written_[copy.block]);
    written_[copy.block] = copy.block_offset + copy.bytes;
    REQUIRE(written_[copy.block] <= layout_.blocks[copy.block].bytes);
    ++tasks_of_block_[copy.block];
    REQUIRE(plan_.last_task_of_block[copy.block] >= task);
    if (tasks_of_block_[copy.block] == plan_.tasks_of_block[copy.block])
      REQUIRE(plan_.last_task_of_block[copy.block] == task);
  }

  const Layout& layout_;
  const std::vector<ReadTask>& reads_;
  const uint64_t slot_bytes_;
  const SlotPlan& plan_;
  std::vector<uint64_t> written_;  // by block: up to where
  std::vector<uint32_t> tasks_of_block_;
  uint32_t next_piece_ = 0, next_copy_ = 0;
};

}  // namespace

void check_slots(const Layout& layout, const std::vector<ReadTask>& reads, uint64_t slot_bytes, const SlotPlan& plan) {
  SlotRules(layout, reads, slot_bytes, plan).check();
}
