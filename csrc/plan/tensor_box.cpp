#include "plan/tensor_box.h"

#include <algorithm>
#include <string>

#include "base/error.h"

namespace weightload {
namespace {

[[noreturn]] void refuse(const std::string& why) {
  throw Error(ErrorKind::usage, "cannot take this part of the tensor: " + why);
}

uint64_t count_of(const IndexRanges& ranges) {
  uint64_t count = 0;
  for (const auto& [begin, end] : ranges) count += end - begin;
  return count;
}

// Neighbours become one, empty ones go.
IndexRanges merged(const IndexRanges& ranges, uint64_t size, size_t dimension) {
  IndexRanges result;
  for (const auto& [begin, end] : ranges) {
    if (begin > end || end > size) {
      refuse("indices " + std::to_string(begin) + " to " + std::to_string(end) + " of dimension " +
             std::to_string(dimension) + ", which has " + std::to_string(size));
    }
    if (begin == end) continue;
    if (!result.empty() && result.back().second == begin) {
      result.back().second = end;
    } else {
      result.emplace_back(begin, end);
    }
  }
  return result;
}

bool is_all(const IndexRanges& ranges, uint64_t size) {
  return ranges.size() == 1 && ranges[0].first == 0 && ranges[0].second == size;
}

uint64_t bytes_of(uint64_t elements, uint32_t bits) {
  if (elements * bits % 8 != 0) refuse("it begins or ends inside a byte");
  return elements * bits / 8;
}

class BoxCutter {
 public:
  BoxCutter(uint64_t begin, const std::vector<uint64_t>& shape, uint32_t bits, std::vector<IndexRanges> wanted)
      : begin_(begin), bits_(bits), wanted_(std::move(wanted)), elements_(shape.size()) {
    uint64_t elements = 1;
    for (size_t d = shape.size(); d-- > 0;) {
      elements_[d] = elements;
      elements *= shape[d];
    }
    // What is inside the innermost dimension of which only a part is wanted is contiguous.
    while (inner_ > 0 && is_all(wanted_[inner_ - 1], shape[inner_ - 1])) --inner_;
    find_rows(shape);
    total_ = elements;
  }

  std::vector<StridedRun> cut() {
    if (inner_ == 0) {
      add({begin_, bytes_of(total_, bits_), 0, 1});
    } else {
      walk(0, 0);
    }
    return std::move(runs_);
  }

 private:
  // Outside of the innermost dimension of which a part is wanted: rows at one distance are one run.
  void find_rows(const std::vector<uint64_t>& shape) {
    if (inner_ == 0) return;
    rows_ = inner_ - 1;
    if (wanted_[inner_ - 1].size() != 1) return;
    while (rows_ > 0 && wanted_[rows_ - 1].size() == 1) {
      --rows_;
      if (!is_all(wanted_[rows_], shape[rows_])) return;
    }
  }

  // All combinations of what is wanted of the dimensions from `d` on, `at` elements from the tensor's beginning.
  void walk(size_t d, uint64_t at) {
    if (d + 1 == inner_) return pieces(at, 1, 0);
    if (d == rows_) {
      const auto [begin, end] = wanted_[d][0];
      uint64_t rows = end - begin;
      for (size_t between = d + 1; between + 1 < inner_; ++between) rows *= count_of(wanted_[between]);
      return pieces(at + begin * elements_[d], rows, elements_[inner_ - 2]);
    }
    for (const auto& [begin, end] : wanted_[d]) {
      for (uint64_t index = begin; index < end; ++index) walk(d + 1, at + index * elements_[d]);
    }
  }

  void pieces(uint64_t at, uint64_t rows, uint64_t distance) {
    const uint64_t unit = elements_[inner_ - 1];
    for (const auto& [begin, end] : wanted_[inner_ - 1]) {
      add({begin_ + bytes_of(at + begin * unit, bits_), bytes_of((end - begin) * unit, bits_),
           rows > 1 ? bytes_of(distance, bits_) : 0, rows});
    }
  }

  void add(StridedRun run) {
    if (run.count == 1) run.stride = run.piece;
    StridedRun* const last = runs_.empty() ? nullptr : &runs_.back();
    if (last != nullptr && last->is_contiguous() && run.is_contiguous() && last->span().end == run.begin) {
      last->piece = last->stride = last->bytes() + run.bytes();
      last->count = 1;
      return;
    }
    if (runs_.size() == kMostRuns) refuse("it has more than " + std::to_string(kMostRuns) + " pieces");
    runs_.push_back(run);
  }

  const uint64_t begin_;
  const uint32_t bits_;
  const std::vector<IndexRanges> wanted_;
  std::vector<uint64_t> elements_;  // by dimension: from one index to the next
  size_t inner_ = wanted_.size();   // dimensions from here on are wanted entirely
  size_t rows_ = 0;                 // the indices of dimensions [rows_, inner_ - 1) are one run's rows
  uint64_t total_ = 1;
  std::vector<StridedRun> runs_;
};

}  // namespace

TensorBox box_of(uint64_t begin, const std::vector<uint64_t>& shape, uint32_t bits,
                 const std::vector<IndexRanges>& wanted) {
  if (wanted.size() != shape.size()) {
    refuse("it has " + std::to_string(wanted.size()) + " dimensions, the tensor " + std::to_string(shape.size()));
  }
  TensorBox box;
  std::vector<IndexRanges> ranges;
  bool empty = false;
  for (size_t d = 0; d < shape.size(); ++d) {
    ranges.push_back(merged(wanted[d], shape[d], d));
    box.shape.push_back(count_of(ranges[d]));
    empty |= box.shape[d] == 0;
  }
  if (!empty) box.runs = BoxCutter(begin, shape, bits, std::move(ranges)).cut();
  return box;
}

}  // namespace weightload
