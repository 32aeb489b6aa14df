#include "plan/layout.h"

#include "check.h"

using namespace weightload;

namespace {

TensorExtent extent(uint32_t file, uint64_t begin, uint64_t size, uint32_t alignment = 2, bool mapped = false) {
  return {file, {begin, begin + size}, alignment, mapped};
}

// What must hold of every layout, whatever the input.
void check_invariants(const std::vector<TensorExtent>& tensors, const LayoutOptions& options, const Layout& layout) {
  CHECK(layout.places.size() == tensors.size());
  uint32_t tensor = 0, run = 0;
  for (uint32_t b = 0; b < layout.blocks.size(); ++b) {
    const Block& block = layout.blocks[b];
    CHECK(block.first_tensor == tensor && block.last_tensor > tensor);
    CHECK(block.first_run == run && block.last_run >= run);
    uint64_t end = 0;
    for (; tensor < block.last_tensor; ++tensor) {
      const TensorPlace& place = layout.places[tensor];
      CHECK(place.block == b);
      if (tensors[tensor].bytes.empty()) continue;  // aligned or not, nobody looks there
      if (!block.mapped) CHECK(place.block_offset % tensors[tensor].alignment == 0);
      if (options.align_every_tensor && !block.mapped) CHECK(place.block_offset % options.block_alignment == 0);
      CHECK(place.block_offset >= end);  // in order, without overlap
      end = place.block_offset + tensors[tensor].bytes.size();
      CHECK(tensors[tensor].mapped == block.mapped);
    }
    CHECK(end == block.bytes);
    CHECK(block.bytes <= options.block_bytes || block.last_run - block.first_run == 1);
    for (; run < block.last_run; ++run) CHECK(layout.runs[run].block == b);
    if (block.mapped) CHECK(block.last_run - block.first_run <= 1);
  }
  CHECK(tensor == tensors.size() && run == layout.runs.size());

  // The runs carry every tensor's bytes to its place.
  for (uint32_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].bytes.empty()) continue;
    bool carried = false;
    for (const CopyRun& r : layout.runs) {
      carried = carried || (r.block == layout.places[i].block && r.file == tensors[i].file &&
                            r.bytes.begin <= tensors[i].bytes.begin && tensors[i].bytes.end <= r.bytes.end &&
                            r.block_offset + (tensors[i].bytes.begin - r.bytes.begin) == layout.places[i].block_offset);
    }
    CHECK(carried);
  }
}

Layout checked(const std::vector<TensorExtent>& tensors, const LayoutOptions& options) {
  Layout layout = plan_layout(tensors, options);
  check_invariants(tensors, options, layout);
  return layout;
}

LayoutOptions host() {
  LayoutOptions options;
  options.align_every_tensor = false;
  options.block_alignment = 64;
  options.block_bytes = 1000;
  return options;
}

}  // namespace

TEST(nothing_gives_nothing) {
  const Layout layout = checked({}, {});
  CHECK(layout.blocks.empty() && layout.runs.empty() && layout.places.empty());
}

TEST(accelerator_tensors_start_on_256) {
  const Layout layout = checked({extent(0, 100, 3), extent(0, 103, 300), extent(0, 403, 1)}, {});
  CHECK(layout.blocks.size() == 1 && layout.runs.size() == 3);
  CHECK(layout.places[0].block_offset == 0);
  CHECK(layout.places[1].block_offset == 256);
  CHECK(layout.places[2].block_offset == 768);
  CHECK(layout.blocks[0].bytes == 769);
}

TEST(accelerator_tensors_that_fill_256_are_one_run) {
  const Layout layout = checked({extent(0, 8, 512), extent(0, 520, 256), extent(0, 776, 4)}, {});
  CHECK(layout.runs.size() == 1 && (layout.runs[0].bytes == ByteRange{8, 780}));
}

TEST(host_tensors_keep_the_files_spacing_in_one_run) {
  std::vector<TensorExtent> tensors;
  for (uint64_t i = 0; i < 100; ++i) tensors.push_back(extent(0, 136 + i * 6, 6));
  const Layout layout = checked(tensors, host());
  CHECK(layout.blocks.size() == 1 && layout.runs.size() == 1);
  CHECK(layout.places[0].block_offset == 136 % 64);
}

TEST(misaligned_host_tensors_are_moved_to_their_alignment) {
  const Layout layout = checked({extent(0, 9, 1, 1), extent(0, 10, 8, 8), extent(0, 18, 8, 8)}, host());
  CHECK(layout.places[1].block_offset % 8 == 0 && layout.places[2].block_offset % 8 == 0);
  CHECK(layout.runs.size() == 2);
}

TEST(a_block_ends_at_its_size) {
  const Layout layout = checked({extent(0, 0, 600), extent(0, 600, 600), extent(0, 1200, 300)}, host());
  CHECK(layout.blocks.size() == 2 && layout.places[1].block == 1 && layout.places[2].block == 1);
}

TEST(a_tensor_larger_than_a_block_has_its_own) {
  const Layout layout = checked({extent(0, 0, 10), extent(0, 10, 5000), extent(0, 5010, 10)}, host());
  CHECK(layout.blocks.size() == 3 && layout.blocks[1].bytes == 5000);
}

TEST(a_tensor_without_room_for_the_next_is_not_made_larger_by_the_files_phase) {
  const Layout layout = checked({extent(0, 8, 700), extent(0, 708, 700), extent(0, 1408, 100)}, host());
  CHECK(layout.blocks.size() == 2 && layout.blocks[0].bytes == 700 && layout.places[0].block_offset == 0);
  CHECK(layout.places[1].block_offset == 708 % 64 && layout.blocks[1].bytes == 708 % 64 + 800);
}

TEST(what_is_to_be_read_directly_keeps_step_with_its_file) {
  constexpr uint64_t kMiB = 1 << 20;
  LayoutOptions options = host();
  options.block_bytes = 64 * kMiB;
  options.direct_alignment = 4096;
  const Layout layout = checked(
      {extent(0, 1000, kMiB), extent(0, 1000 + kMiB, 10), extent(0, 3 * kMiB + 20, 2 * kMiB), extent(0, 9 * kMiB, 20),
       extent(1, 77, kMiB, 1), extent(1, 2 * kMiB + 1, kMiB, 2), extent(1, 5 * kMiB + 10, 64 * kMiB)},
      options);
  CHECK(layout.places[0].block_offset == 1000 && layout.places[1].block_offset == 1000 + kMiB);
  CHECK(layout.places[2].block_offset % 4096 == 20);
  CHECK(layout.places[3].block_offset == layout.places[2].block_offset + 2 * kMiB);  // small: no gap
  CHECK(layout.places[4].block_offset % 4096 == 77);
  CHECK(layout.places[5].block_offset % 2 == 0);  // its alignment comes first
  CHECK(layout.blocks.size() == 2 && layout.places[6].block_offset == 10);
}

TEST(blocks_span_files) {
  const Layout layout = checked({extent(0, 64, 10), extent(1, 64, 10)}, host());
  CHECK(layout.blocks.size() == 1 && layout.runs.size() == 2);
}

TEST(mapped_blocks_are_contiguous_in_one_file) {
  const auto mapped = [](uint32_t file, uint64_t begin, uint64_t size) { return extent(file, begin, size, 1, true); };
  const Layout layout = checked({mapped(0, 8, 10), mapped(0, 18, 10), mapped(0, 30, 10), mapped(1, 40, 10)}, host());
  CHECK(layout.blocks.size() == 3);
  CHECK(layout.places[1].block == 0 && layout.places[1].block_offset == 10);
  CHECK(layout.places[2].block == 1 && layout.places[2].block_offset == 0);
}

TEST(mapped_and_private_tensors_do_not_share_a_block) {
  const Layout layout =
      checked({extent(0, 8, 10, 1, true), extent(0, 19, 10, 8, false), extent(0, 32, 8, 1, true)}, host());
  CHECK(layout.blocks.size() == 3 && layout.blocks[0].mapped && !layout.blocks[1].mapped && layout.blocks[2].mapped);
}

TEST(empty_tensors_have_a_place_and_no_run) {
  const Layout layout = checked({extent(0, 8, 0), extent(0, 8, 10), extent(0, 18, 0), extent(0, 18, 10)}, host());
  CHECK(layout.blocks.size() == 1 && layout.runs.size() == 1);
  const Layout mapped = checked(
      {extent(0, 8, 0, 1, true), extent(0, 8, 10, 1, true), extent(0, 18, 0, 1, true), extent(0, 18, 2, 1, true)},
      host());
  CHECK(mapped.blocks.size() == 1 && mapped.runs.size() == 1);
}

TEST(any_mixture_keeps_the_invariants) {
  uint64_t state = 1;
  const auto random = [&](uint64_t below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % below;
  };
  for (int round = 0; round < 2000; ++round) {
    std::vector<TensorExtent> tensors;
    uint64_t position = random(200);
    uint32_t file = 0;
    for (uint64_t i = random(30); i > 0; --i) {
      if (random(8) == 0) ++file, position = random(200);
      if (random(6) == 0) position += random(50);
      const uint64_t size = random(5) == 0 ? 0 : random(10) == 0 ? random(3000) + 1 : random(60) + 1;
      const uint32_t alignment = 1u << random(4);
      tensors.push_back(extent(file, position, size, alignment, position % alignment == 0 && random(2) == 0));
      position += size;
    }
    LayoutOptions options = host();
    options.align_every_tensor = random(2) == 0;
    options.block_alignment = options.align_every_tensor ? 256 : 64;
    checked(tensors, options);
  }
}
