#include "plan/layout.h"

#include <algorithm>

namespace weightload {
namespace {

// Smaller tensors that do not follow the one before in their file are not worth a gap of up to direct_alignment.
constexpr uint64_t kLeastDirect = 1 << 20;

class LayoutBuilder {
 public:
  LayoutBuilder(const std::vector<TensorExtent>& tensors, const LayoutOptions& options)
      : tensors_(tensors), options_(options) {
    layout_.places.reserve(tensors.size());
  }

  Layout build() {
    for (uint32_t i = 0; i < tensors_.size(); ++i) place(i);
    close_block(static_cast<uint32_t>(tensors_.size()));
    return std::move(layout_);
  }

 private:
  void place(uint32_t index) {
    const TensorExtent& tensor = tensors_[index];
    uint64_t offset = open_ ? next_offset(tensor) : 0;
    if (open_ && (tensor.alone || tensors_[index - 1].alone || !fits(tensor, offset))) close_block(index);
    if (!open_) {
      open_block(index, tensor);
      offset = first_offset(index);
    }
    layout_.places.push_back({current_block(), offset});
    if (tensor.bytes.empty()) return;
    add_run(tensor, offset);
    layout_.blocks.back().bytes = offset + tensor.bytes.size();
  }

  // Where a block's first tensor starts. Host blocks copy the file's phase, so that neighbours which are
  // aligned in the file stay aligned without padding. Where there is no room for a neighbour, the phase would only make
  // the block larger than its tensor: by a page, if that fills its pages. Direct reads are worth the page.
  uint64_t first_offset(uint32_t index) const {
    const TensorExtent& tensor = tensors_[index];
    if (options_.align_every_tensor || tensor.mapped || tensor.alone) return 0;
    if (options_.direct_alignment != 0)
      return round_down(tensor.bytes.begin % options_.direct_alignment, tensor.alignment);
    const uint64_t phase = round_down(tensor.bytes.begin % options_.block_alignment, tensor.alignment);
    const uint64_t next = index + 1 < tensors_.size() ? tensors_[index + 1].bytes.size() : 0;
    const bool room = tensor.bytes.size() <= options_.block_bytes && next <= options_.block_bytes &&
                      phase + tensor.bytes.size() + options_.block_alignment + next <= options_.block_bytes;
    return room ? phase : 0;
  }

  uint64_t next_offset(const TensorExtent& tensor) const {
    const uint64_t end = layout_.blocks.back().bytes;
    if (tensor.mapped) return end;
    if (options_.direct_alignment != 0 && tensor.bytes.size() >= kLeastDirect) {
      const uint64_t in_step = end + (tensor.bytes.begin - end) % options_.direct_alignment;
      if (in_step % tensor.alignment == 0) return in_step;
    }
    const uint64_t least = options_.align_every_tensor ? options_.block_alignment : 1;
    return round_up(end, std::max<uint64_t>(least, tensor.alignment));
  }

  bool fits(const TensorExtent& tensor, uint64_t offset) const {
    if (tensor.bytes.empty()) return true;
    const Block& block = layout_.blocks.back();
    if (block.mapped != tensor.mapped) return false;
    const bool has_runs = block.first_run < layout_.runs.size();
    if (tensor.mapped && has_runs && !continues_last_run(tensor, offset)) return false;
    return offset + tensor.bytes.size() <= options_.block_bytes;
  }

  bool continues_last_run(const TensorExtent& tensor, uint64_t offset) const {
    if (layout_.runs.empty()) return false;
    const CopyRun& run = layout_.runs.back();
    return run.piece == 0 && tensor.runs == nullptr && run.block == current_block() && run.file == tensor.file &&
           run.bytes.end == tensor.bytes.begin && run.block_offset + run.bytes.size() == offset;
  }

  void add_run(const TensorExtent& tensor, uint64_t offset) {
    if (tensor.runs != nullptr) {
      for (const StridedRun& run : *tensor.runs) {
        const ByteRange bytes{run.begin, run.begin + run.bytes()};
        const bool contiguous = run.is_contiguous();
        layout_.runs.push_back(
            {tensor.file, bytes, current_block(), offset, contiguous ? 0 : run.piece, contiguous ? 0 : run.stride});
        offset += bytes.size();
      }
    } else if (continues_last_run(tensor, offset))
      layout_.runs.back().bytes.end = tensor.bytes.end;
    else
      layout_.runs.push_back({tensor.file, tensor.bytes, current_block(), offset, 0, 0});
  }

  void open_block(uint32_t index, const TensorExtent& tensor) {
    Block block;
    block.first_tensor = index;
    block.first_run = static_cast<uint32_t>(layout_.runs.size());
    block.mapped = tensor.mapped;
    layout_.blocks.push_back(block);
    open_ = true;
  }

  void close_block(uint32_t last_tensor) {
    if (!open_) return;
    layout_.blocks.back().last_tensor = last_tensor;
    layout_.blocks.back().last_run = static_cast<uint32_t>(layout_.runs.size());
    open_ = false;
  }

  uint32_t current_block() const { return static_cast<uint32_t>(layout_.blocks.size() - 1); }

  const std::vector<TensorExtent>& tensors_;
  const LayoutOptions& options_;
  Layout layout_;
  bool open_ = false;
};

}  // namespace

Layout plan_layout(const std::vector<TensorExtent>& tensors, const LayoutOptions& options) {
  return LayoutBuilder(tensors, options).build();
}

}  // namespace weightload
