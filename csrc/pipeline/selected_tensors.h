#pragma once
#include <cstdint>
#include <vector>

#include "base/error.h"
#include "pipeline/checkpoint_file.h"

namespace weightload {

// The tensors of a load, in the order in which they are yielded: files as given, tensors by offset.
class SelectedTensors {
 public:
  // `selection[f]` lists tensors of file f by their number in its header, ascending. Throws on names that occur in two
  // files.
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
  struct Tensor {
    uint32_t file;
    uint32_t index;  // in the file's header
  };

  void refuse_duplicates() const;

  CheckpointFiles files_;
  std::vector<Tensor> tensors_;
  uint64_t total_bytes_ = 0;
};

}  // namespace weightload
