#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/error.h"
#include "checkpoint/checkpoint_file.h"
#include "plan/tensor_box.h"

namespace weightload {

// A tensor's place in a checkpoint: its file's number, and its own in the file's header.
struct SelectedTensor {
  uint32_t file;
  uint32_t index;
};

// The tensors whose names occur more than once: those of one name together, in the order of the load, names in the
// order in which they first repeat. `selection` as below; null for every tensor.
std::vector<std::vector<SelectedTensor>> repeated_tensors(const CheckpointFiles& files,
                                                          const std::vector<std::vector<uint32_t>>* selection);

// A digest of which tensors are selected, by file, name and place in the file: the same on every rank whose files have
// equal headers. All ranks that compare it run the same build of the same standard library.
uint64_t selection_digest(const CheckpointFiles& files, const std::vector<std::vector<uint32_t>>& selection);

// Of each tensor of a load, in order, what is wanted of each of its dimensions; nothing for all of the tensor. An empty
// list: all of all.
using WantedParts = std::vector<std::optional<std::vector<IndexRanges>>>;

// The tensors of a load, in the order in which they are yielded: files as given, tensors by offset.
class SelectedTensors {
 public:
  // `selection[f]` lists tensors of file f by their number in its header, ascending. That no name occurs twice is for
  // who selects to see to: with repeated_tensors(). Throws Error{usage} for parts that are not in their tensor.
  SelectedTensors(CheckpointFiles files, const std::vector<std::vector<uint32_t>>& selection,
                  const WantedParts& parts = {});

  size_t size() const { return tensors_.size(); }
  uint64_t total_bytes() const { return total_bytes_; }
  uint32_t file_index(size_t tensor) const { return tensors_[tensor].file; }
  const CheckpointFile* file(size_t tensor) const { return files_[tensors_[tensor].file].get(); }

  // Of a tensor of which a part is wanted: the part's shape, where its bytes begin, and their number.
  const TensorInfo& info(size_t tensor) const {
    if (!parts_.empty() && parts_[tensor]) return parts_[tensor]->info;
    return file(tensor)->header().tensors[tensors_[tensor].index];
  }

  // Where the bytes of a part are that is not contiguous in its file; null for all others.
  const std::vector<StridedRun>* runs(size_t tensor) const {
    if (parts_.empty() || !parts_[tensor] || parts_[tensor]->runs.empty()) return nullptr;
    return &parts_[tensor]->runs;
  }
  const CheckpointFiles& files() const { return files_; }

  // An error of a reading thread, with the tensor that it hit: threads know bytes only. Looks from tensor `from` on.
  Error name_tensor(const Error& error, size_t from) const;

  // The same error about memory, for the tensor it was for.
  Error for_tensor(const Error& error, size_t tensor) const;

  // Lets go of the files; nothing else may be called afterwards but size() and total_bytes().
  void close() { files_.clear(); }

 private:
  struct Part {
    TensorInfo info;
    std::vector<StridedRun> runs;  // none where one read will do
  };

  ByteRange span(size_t tensor) const;
  void take_part(size_t tensor, const std::vector<IndexRanges>& wanted);

  CheckpointFiles files_;
  std::vector<SelectedTensor> tensors_;
  std::vector<std::unique_ptr<const Part>> parts_;  // by tensor; empty if no tensor has one
  uint64_t total_bytes_ = 0;
};

}  // namespace weightload
