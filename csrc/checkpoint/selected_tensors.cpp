#include "checkpoint/selected_tensors.h"

#include <algorithm>
#include <functional>
#include <string_view>
#include <utility>

#include "base/repeated_name.h"
#include "format/dtype.h"

namespace weightload {

std::vector<std::vector<SelectedTensor>> repeated_tensors(const CheckpointFiles& files,
                                                          const std::vector<std::vector<uint32_t>>* selection) {
  std::vector<std::vector<SelectedTensor>> repeated;
  if (files.size() < 2) return repeated;  // within one file the header has been checked
  std::vector<SelectedTensor> places;
  std::vector<std::string_view> names;
  const auto add = [&](uint32_t file, uint32_t index) {
    places.push_back({file, index});
    names.push_back(files[file]->header().tensors.at(index).name);
  };
  for (uint32_t f = 0; f < files.size(); ++f) {
    if (selection != nullptr) {
      for (const uint32_t index : selection->at(f)) add(f, index);
    } else {
      for (uint32_t index = 0; index < files[f]->header().tensors.size(); ++index) add(f, index);
    }
  }
  for (const std::vector<size_t>& numbers : all_repeated(names)) {
    std::vector<SelectedTensor>& of_one_name = repeated.emplace_back();
    for (const size_t number : numbers) of_one_name.push_back(places[number]);
  }
  return repeated;
}

uint64_t selection_digest(const CheckpointFiles& files, const std::vector<std::vector<uint32_t>>& selection) {
  uint64_t digest = 0;
  const auto mix = [&](uint64_t value) {
    digest = (digest ^ value) * 0x9E3779B97F4A7C15u;
    digest ^= digest >> 32;
  };
  for (size_t f = 0; f < files.size(); ++f) {
    mix(selection.at(f).size());
    for (const uint32_t index : selection[f]) {
      const TensorInfo& tensor = files[f]->header().tensors.at(index);
      mix(std::hash<std::string_view>()(tensor.name));
      mix(tensor.bytes.begin);
    }
  }
  return digest;
}

SelectedTensors::SelectedTensors(CheckpointFiles files, const std::vector<std::vector<uint32_t>>& selection,
                                 const WantedParts& parts)
    : files_(std::move(files)) {
  for (uint32_t f = 0; f < files_.size(); ++f) {
    for (uint32_t index : selection.at(f)) {
      static_cast<void>(files_[f]->header().tensors.at(index));
      tensors_.push_back({f, index});
    }
  }
  if (!parts.empty()) {
    parts_.resize(size());
    for (size_t i = 0; i < size(); ++i) {
      if (parts.at(i)) take_part(i, *parts[i]);
    }
  }
  for (size_t i = 0; i < size(); ++i) total_bytes_ += info(i).bytes.size();
}

void SelectedTensors::take_part(size_t tensor, const std::vector<IndexRanges>& wanted) {
  const TensorInfo& whole = info(tensor);
  auto part = std::make_unique<Part>();
  TensorBox box;
  try {
    box = box_of(whole.bytes.begin, whole.shape, dtype_bits(whole.dtype), wanted);
  } catch (const Error& error) {
    throw for_tensor(error, tensor);
  }
  part->info = {whole.name, whole.dtype, std::move(box.shape), {whole.bytes.begin, whole.bytes.begin}};
  if (!box.runs.empty()) {
    uint64_t bytes = 0;
    for (const StridedRun& run : box.runs) bytes += run.bytes();
    part->info.bytes = {box.runs[0].begin, box.runs[0].begin + bytes};
    if (box.runs.size() > 1 || !box.runs[0].is_contiguous()) part->runs = std::move(box.runs);
  }
  parts_[tensor] = std::move(part);
}

// All bytes of the file between the first and the last that are wanted of a tensor.
ByteRange SelectedTensors::span(size_t tensor) const {
  const std::vector<StridedRun>* const pieces = runs(tensor);
  if (pieces == nullptr) return info(tensor).bytes;
  ByteRange span = pieces->front().span();
  for (const StridedRun& run : *pieces) span = {std::min(span.begin, run.begin), std::max(span.end, run.span().end)};
  return span;
}

Error SelectedTensors::name_tensor(const Error& error, size_t from) const {
  ErrorContext where = error.context;
  for (size_t i = from; i < size() && where.offset && where.tensor.empty(); ++i) {
    const ByteRange bytes = span(i);
    const bool here = bytes.begin <= *where.offset && *where.offset < bytes.end;
    if (here && file(i)->path() == where.path) where.tensor = info(i).name;
  }
  return Error(error.kind, error.message, where, error.rule);
}

Error SelectedTensors::for_tensor(const Error& error, size_t tensor) const {
  return Error(error.kind, error.message, {file(tensor)->path(), info(tensor).name, {}, error.context.error_number});
}

}  // namespace weightload
