#include "plan/slot_plan.h"

#include <utility>

namespace weightload {
namespace {

// Copies out of a slot start at multiples of this in the image: what a bus moves at a time.
constexpr uint64_t kCopyAlignment = 64;

class SlotPlanner {
 public:
  SlotPlanner(size_t blocks, uint64_t slot_bytes) : slot_bytes_(slot_bytes) {
    plan_.tasks_of_block.resize(blocks);
    plan_.last_task_of_block.resize(blocks);
  }

  void add(const ReadTask& read) {
    uint64_t image_offset = open_ ? next_offset(read) : 0;
    if (open_ && (read.piece != 0 || !fits(read, image_offset))) open_ = false;
    if (!open_) {
      open(read);
      image_offset = 0;
    }
    SlotTask& task = plan_.tasks.back();
    if (read.piece != 0) {
      task.run = read.run();
      open_ = false;
    }
    const bool same_block = block_is_open(read.block);
    task.bytes.end = read.bytes.end;
    plan_.pieces.push_back({read.bytes, image_offset});
    task.last_piece = static_cast<uint32_t>(plan_.pieces.size());
    if (same_block) {
      SlotCopy& copy = plan_.copies.back();
      copy.bytes = image_offset + read.bytes.size() - copy.image_offset;
      return;
    }
    plan_.copies.push_back({image_offset, read.bytes.size(), read.block, read.block_offset});
    task.last_copy = static_cast<uint32_t>(plan_.copies.size());
    ++plan_.tasks_of_block[read.block];
    plan_.last_task_of_block[read.block] = static_cast<uint32_t>(plan_.tasks.size() - 1);
  }

  SlotPlan take() { return std::move(plan_); }

 private:
  bool block_is_open(uint32_t block) const {
    const SlotTask& task = plan_.tasks.back();
    return task.first_copy < task.last_copy && plan_.copies.back().block == block;
  }

  // Where the read would go in the image of the open slot.
  uint64_t next_offset(const ReadTask& read) const {
    const SlotCopy& copy = plan_.copies.back();
    if (copy.block == read.block) return copy.image_offset + (read.block_offset - copy.block_offset);
    return round_up(copy.image_offset + copy.bytes, kCopyAlignment);
  }

  bool fits(const ReadTask& read, uint64_t image_offset) const {
    const SlotTask& task = plan_.tasks.back();
    return read.file == task.file && read.bytes.begin == task.bytes.end &&
           task.lead + image_offset + read.bytes.size() <= slot_bytes_;
  }

  void open(const ReadTask& read) {
    SlotTask task;
    task.file = read.file;
    task.bytes = {read.bytes.begin, read.bytes.begin};
    task.lead = read.piece != 0 ? 0 : read.bytes.begin % kDirectAlignment;
    task.first_piece = task.last_piece = static_cast<uint32_t>(plan_.pieces.size());
    task.first_copy = task.last_copy = static_cast<uint32_t>(plan_.copies.size());
    plan_.tasks.push_back(task);
    open_ = true;
  }

  uint64_t slot_bytes_;
  SlotPlan plan_;
  bool open_ = false;
};

}  // namespace

SlotPlan plan_slots(const std::vector<ReadTask>& reads, size_t blocks, uint64_t slot_bytes) {
  SlotPlanner planner(blocks, slot_bytes);
  for (const ReadTask& read : reads) planner.add(read);
  return planner.take();
}

}  // namespace weightload
