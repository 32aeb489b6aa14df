#include "pipeline/selected_tensors.h"

#include <string_view>
#include <utility>

#include "base/repeated_name.h"

namespace weightload {

SelectedTensors::SelectedTensors(CheckpointFiles files, const std::vector<std::vector<uint32_t>>& selection)
    : files_(std::move(files)) {
  for (uint32_t f = 0; f < files_.size(); ++f) {
    for (uint32_t index : selection.at(f)) {
      total_bytes_ += files_[f]->header().tensors.at(index).bytes.size();
      tensors_.push_back({f, index});
    }
  }
  refuse_duplicates();
}

void SelectedTensors::refuse_duplicates() const {
  if (files_.size() < 2) return;  // within one file the header has been checked
  std::vector<std::string_view> names;
  names.reserve(tensors_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) names.push_back(info(i).name);
  if (const auto repeated = first_repeated(names)) {
    throw Error(ErrorKind::header, "an earlier file of the checkpoint has a tensor of this name too",
                {file(*repeated)->path(), info(*repeated).name, {}, 0}, rule::kDuplicateTensor);
  }
}

Error SelectedTensors::name_tensor(const Error& error, size_t from) const {
  ErrorContext where = error.context;
  for (size_t i = from; i < size() && where.offset && where.tensor.empty(); ++i) {
    const bool here = info(i).bytes.begin <= *where.offset && *where.offset < info(i).bytes.end;
    if (here && file(i)->path() == where.path) where.tensor = info(i).name;
  }
  return Error(error.kind, error.message, where, error.rule);
}

Error SelectedTensors::for_tensor(const Error& error, size_t tensor) const {
  return Error(error.kind, error.message, {file(tensor)->path(), info(tensor).name, {}, error.context.error_number});
}

}  // namespace weightload
