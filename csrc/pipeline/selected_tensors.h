#pragma once
#include <cstdint>
#include <vector>

#include "base/error.h"
#include "pipeline/checkpoint_file.h"

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

// The tensors of a load, in the order in which they are yielded: files as given, tensors by offset.
class SelectedTensors {
 public:
  // `selection[f]` lists tensors of file f by their number in its header, ascending. That no name occurs twice is for
  // who selects to see to: with repeated_tensors().
  SelectedTensors(CheckpointFiles files, const std::vector<std::vector<uint32_t>>& selection);

  size_t size() const { return tensors_.size(); }
  uint64_t total_bytes() const { return total_bytes_; }
  uint32_t file_index(size_t tensor) const { return tensors_[tensor].file; }
  const CheckpointFile* file(size_t tensor) const { return files_[tensors_[tensor].file].get(); }
  const TensorInfo& info(size_t tensor) const { return file(tensor)->header().tensors[tensors_[tensor].index]; }
  const CheckpointFiles& files() const { return files_; }

  // An error of a reading thread, with the tensor that it hit: threads know bytes only. Looks from tensor `from` on.
  Error name_tensor(const Error& error, size_t from) const;

  // The same error about memory, for the tensor it was for.
  Error for_tensor(const Error& error, size_t tensor) const;

  // Lets go of the files; nothing else may be called afterwards but size() and total_bytes().
  void close() { files_.clear(); }

 private:
  CheckpointFiles files_;
  std::vector<SelectedTensor> tensors_;
  uint64_t total_bytes_ = 0;
};

}  // namespace weightload
