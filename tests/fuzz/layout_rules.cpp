#include <algorithm>

#include "plan_rules.h"
#include "require.h"

using namespace weightload;

namespace {

class LayoutRules {
 public:
  LayoutRules(const std::vector<TensorExtent>& tensors, const LayoutOptions& options, const Layout& layout)
      : tensors_(tensors), options_(options), layout_(layout) {}

  void check() {
    REQUIRE(layout_.places.size() == tensors_.size());
    REQUIRE(layout_.blocks.size() <= tensors_.size());
    for (uint32_t b = 0; b < layout_.blocks.size(); ++b) block(b);
    REQUIRE(next_tensor_ == tensors_.size());
    REQUIRE(next_run_ == layout_.runs.size());
  }

 private:
  void block(uint32_t number) {
    const Block& block = layout_.blocks[number];
    REQUIRE(block.first_tensor == next_tensor_ && block.last_tensor > block.first_tensor);
    REQUIRE(block.first_run == next_run_ && block.last_run >= block.first_run);
    REQUIRE(block.last_run <= layout_.runs.size());
    uint64_t end = 0, in_tensors = 0;
    uint32_t filled = 0;
    for (; next_tensor_ < block.last_tensor; ++next_tensor_) {
      const TensorExtent& tensor = tensors_[next_tensor_];
      place(number, end);
      if (tensor.alone) REQUIRE(block.last_tensor - block.first_tensor == 1);
      if (tensor.bytes.empty()) continue;
      end = layout_.places[next_tensor_].block_offset + tensor.bytes.size();
      in_tensors += tensor.bytes.size();
      ++filled;
    }
    REQUIRE(end == block.bytes);
    REQUIRE(block.bytes <= options_.block_bytes || filled == 1);
    if (block.mapped) REQUIRE(block.last_run - block.first_run <= 1 && block.bytes == in_tensors);
    // Padding: before each tensor less than a block's alignment.
    REQUIRE(block.bytes - in_tensors <= filled * (options_.block_alignment - 1));
    runs(number, in_tensors);
  }

  // The tensor's place: in its block, behind the last one, aligned, and carried there by a run.
  void place(uint32_t block, uint64_t end) {
    const TensorExtent& tensor = tensors_[next_tensor_];
    const TensorPlace& place = layout_.places[next_tensor_];
    REQUIRE(place.block == block);
    if (tensor.bytes.empty()) return;
    REQUIRE(tensor.mapped == layout_.blocks[block].mapped);
    REQUIRE(place.block_offset >= end);
    if (tensor.alone) REQUIRE(place.block_offset == 0);
    if (!tensor.mapped) {
      REQUIRE(place.block_offset % tensor.alignment == 0);
      if (options_.align_every_tensor) REQUIRE(place.block_offset % options_.block_alignment == 0);
    }
    while (run_of_tensor_ < layout_.runs.size() && !carries(layout_.runs[run_of_tensor_], tensor, place))
      ++run_of_tensor_;
    REQUIRE(run_of_tensor_ < layout_.runs.size());
  }

  static bool carries(const CopyRun& run, const TensorExtent& tensor, const TensorPlace& place) {
    return run.block == place.block && run.file == tensor.file && run.bytes.begin <= tensor.bytes.begin &&
           tensor.bytes.end <= run.bytes.end &&
           run.block_offset + (tensor.bytes.begin - run.bytes.begin) == place.block_offset;
  }

  // Runs that follow each other without touching carry each byte at most once; of as many bytes as the tensors have,
  // exactly once.
  void runs(uint32_t number, uint64_t in_tensors) {
    const Block& block = layout_.blocks[number];
    uint64_t end = 0, in_runs = 0;
    for (; next_run_ < block.last_run; ++next_run_) {
      const CopyRun& run = layout_.runs[next_run_];
      REQUIRE(run.block == number && !run.bytes.empty());
      REQUIRE(run.bytes.begin < run.bytes.end);
      REQUIRE(run.block_offset >= end);
      end = run.block_offset + run.bytes.size();
      in_runs += run.bytes.size();
    }
    REQUIRE(end == block.bytes);
    REQUIRE(in_runs == in_tensors);
  }

  const std::vector<TensorExtent>& tensors_;
  const LayoutOptions& options_;
  const Layout& layout_;
  uint32_t next_tensor_ = 0, next_run_ = 0;
  uint32_t run_of_tensor_ = 0;  // neither tensors nor runs go back
};

}  // namespace

void check_layout(const std::vector<TensorExtent>& tensors, const LayoutOptions& options, const Layout& layout) {
  LayoutRules(tensors, options, layout).check();
}
