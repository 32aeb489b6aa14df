#include "plan/slot_plan.h"

#include <random>

#include "check.h"
#include "plan/layout.h"

using namespace weightload;

namespace {

struct Plans {
  Layout layout;
  SlotPlan slots;
};

Plans plan(const std::vector<TensorExtent>& tensors, uint64_t block_bytes, uint64_t slot_bytes) {
  LayoutOptions layout;
  layout.block_bytes = block_bytes;
  Plans plans{plan_layout(tensors, layout), {}};
  ReadPlanOptions reads;
  reads.task_bytes = slot_bytes;
  plans.slots = plan_slots(plan_reads(plans.layout, reads).tasks, plans.layout.blocks.size(), slot_bytes);
  return plans;
}

// Carries every byte the way the loader does, and compares where it arrives with where the layout wants it.
void check(const std::vector<TensorExtent>& tensors, const Plans& plans, uint64_t slot_bytes) {
  std::vector<std::vector<int64_t>> blocks;
  for (const Block& block : plans.layout.blocks) blocks.emplace_back(block.bytes, -1);
  std::vector<uint32_t> tasks_of_block(blocks.size());
  std::vector<uint32_t> last_task(blocks.size());
  for (uint32_t t = 0; t < plans.slots.tasks.size(); ++t) {
    const SlotTask& task = plans.slots.tasks[t];
    CHECK(task.lead == task.bytes.begin % kDirectAlignment);
    CHECK(task.lead + task.bytes.size() <= slot_bytes);
    CHECK(round_up(task.bytes.end, kDirectAlignment) - round_down(task.bytes.begin, kDirectAlignment) <= slot_bytes);
    std::vector<int64_t> image(slot_bytes - task.lead, -2);
    uint64_t position = task.bytes.begin;
    for (uint32_t p = task.first_piece; p < task.last_piece; ++p) {
      const SlotPiece& piece = plans.slots.pieces[p];
      CHECK(piece.bytes.begin == position);
      CHECK(piece.image_offset >= piece.bytes.begin - task.bytes.begin);
      for (uint64_t i = 0; i < piece.bytes.size(); ++i)
        image.at(piece.image_offset + i) = static_cast<int64_t>(piece.bytes.begin + i) * 8 + task.file;
      position = piece.bytes.end;
    }
    CHECK(position == task.bytes.end);
    for (uint32_t c = task.first_copy; c < task.last_copy; ++c) {
      const SlotCopy& copy = plans.slots.copies[c];
      ++tasks_of_block[copy.block];
      last_task[copy.block] = t;
      for (uint64_t i = 0; i < copy.bytes; ++i)
        blocks.at(copy.block).at(copy.block_offset + i) = image.at(copy.image_offset + i);
    }
  }
  CHECK(tasks_of_block == plans.slots.tasks_of_block);
  for (size_t b = 0; b < blocks.size(); ++b)
    CHECK(tasks_of_block[b] == 0 || last_task[b] == plans.slots.last_task_of_block[b]);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorPlace& place = plans.layout.places[i];
    for (uint64_t at = 0; at < tensors[i].bytes.size(); ++at) {
      CHECK(blocks.at(place.block).at(place.block_offset + at) ==
            static_cast<int64_t>(tensors[i].bytes.begin + at) * 8 + tensors[i].file);
    }
  }
}

std::vector<TensorExtent> consecutive(uint64_t begin, const std::vector<uint64_t>& sizes) {
  std::vector<TensorExtent> tensors;
  for (uint64_t size : sizes) {
    tensors.push_back({0, {begin, begin + size}, 1, false, false});
    begin += size;
  }
  return tensors;
}

}  // namespace

TEST(aligned_neighbours_are_one_piece_and_one_copy) {
  const auto tensors = consecutive(8192, std::vector<uint64_t>(16, 1024));
  const Plans plans = plan(tensors, 1 << 20, 64 << 10);
  CHECK(plans.slots.tasks.size() == 1);
  CHECK(plans.slots.pieces.size() == 1);
  CHECK(plans.slots.copies.size() == 1);
  check(tensors, plans, 64 << 10);
}

TEST(odd_sizes_are_many_pieces_and_one_copy) {
  const auto tensors = consecutive(100, std::vector<uint64_t>(50, 777));
  const Plans plans = plan(tensors, 1 << 20, 64 << 10);
  CHECK(plans.slots.tasks.size() == 1);
  CHECK(plans.slots.pieces.size() == 50);
  CHECK(plans.slots.copies.size() == 1);
  check(tensors, plans, 64 << 10);
}

TEST(padding_that_outgrows_a_slot_starts_another) {
  const auto tensors = consecutive(0, std::vector<uint64_t>(100, 1));  // 1 byte in the file, 256 on the device
  const Plans plans = plan(tensors, 1 << 20, 4096);
  CHECK(plans.slots.tasks.size() == 7);
  check(tensors, plans, 4096);
}

TEST(a_slot_carries_many_blocks_of_their_own) {
  auto tensors = consecutive(4096, std::vector<uint64_t>(100, 300));
  for (TensorExtent& tensor : tensors) tensor.alone = true;
  const Plans plans = plan(tensors, 1 << 20, 64 << 10);
  CHECK(plans.layout.blocks.size() == 100);
  CHECK(plans.slots.tasks.size() == 1);
  CHECK(plans.slots.copies.size() == 100);
  check(tensors, plans, 64 << 10);
}

TEST(gaps_and_files_end_a_slot) {
  std::vector<TensorExtent> tensors = {{0, {100, 200}, 1, false, false},
                                       {0, {300, 400}, 1, false, false},
                                       {1, {400, 500}, 1, false, false},
                                       {1, {500, 500}, 1, false, false},
                                       {1, {500, 600}, 1, false, false}};
  const Plans plans = plan(tensors, 1 << 20, 64 << 10);
  CHECK(plans.slots.tasks.size() == 3);
  check(tensors, plans, 64 << 10);
}

TEST(every_byte_arrives_at_its_place_whatever_the_sizes) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    std::vector<TensorExtent> tensors;
    uint64_t position = random() % 5000;
    uint32_t file = 0;
    for (int i = 0; i < 60; ++i) {
      if (random() % 15 == 0) ++file, position = random() % 5000;
      if (random() % 10 == 0) position += random() % 3000;
      const uint64_t size = random() % 4 == 0 ? random() % 30'000 : random() % 600;
      tensors.push_back({file, {position, position + size}, 1, false, random() % 5 == 0});
      position += size;
    }
    const uint64_t slot_bytes = 4096u << (random() % 4);
    check(tensors, plan(tensors, 1000 + random() % 50'000, slot_bytes), slot_bytes);
  }
}
