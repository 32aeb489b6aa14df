#include "plan/tensor_box.h"

#include <random>

#include "base/error.h"
#include "check.h"
#include "run_bytes.h"

using namespace weightload;

namespace {

constexpr uint64_t kBegin = 1000;

// The places in the file of all bytes of a box, one index after the other: what runs are to say, too.
std::vector<uint64_t> bytes_by_index(const std::vector<uint64_t>& shape, uint64_t element,
                                     const std::vector<IndexRanges>& wanted) {
  std::vector<uint64_t> found{0};
  for (size_t d = 0; d < shape.size(); ++d) {
    std::vector<uint64_t> deeper;
    for (const uint64_t at : found) {
      for (const auto& [begin, end] : wanted[d]) {
        for (uint64_t index = begin; index < end; ++index) deeper.push_back(at * shape[d] + index);
      }
    }
    found = std::move(deeper);
  }
  std::vector<uint64_t> bytes;
  for (const uint64_t at : found) {
    for (uint64_t byte = 0; byte < element; ++byte) bytes.push_back(kBegin + at * element + byte);
  }
  return bytes;
}

std::vector<uint64_t> bytes_by_run(const TensorBox& box) {
  std::vector<uint64_t> bytes;
  for (const StridedRun& run : box.runs) add_bytes(run, bytes);
  return bytes;
}

bool is_refused(const std::vector<uint64_t>& shape, uint32_t bits, const std::vector<IndexRanges>& wanted) {
  try {
    box_of(kBegin, shape, bits, wanted);
  } catch (const Error& error) {
    return error.kind == ErrorKind::usage;
  }
  return false;
}

}  // namespace

TEST(rows_of_a_tensor_are_one_run) {
  const TensorBox box = box_of(kBegin, {8, 16}, 16, {{{2, 4}}, {{0, 16}}});
  CHECK((box.shape == std::vector<uint64_t>{2, 16}));
  CHECK((box.runs == std::vector<StridedRun>{{kBegin + 64, 64, 64, 1}}));
}

TEST(columns_of_a_tensor_are_a_piece_a_row) {
  const TensorBox box = box_of(kBegin, {8, 16}, 16, {{{0, 8}}, {{4, 8}}});
  CHECK((box.runs == std::vector<StridedRun>{{kBegin + 8, 8, 32, 8}}));
}

TEST(rows_of_several_dimensions_are_one_run_where_they_lie_at_one_distance) {
  const TensorBox box = box_of(kBegin, {4, 3, 8}, 8, {{{1, 3}}, {{0, 3}}, {{2, 4}}});
  CHECK((box.runs == std::vector<StridedRun>{{kBegin + 24 + 2, 2, 8, 6}}));
  CHECK(box_of(kBegin, {4, 3, 8}, 8, {{{1, 3}}, {{0, 2}}, {{2, 4}}}).runs.size() == 2);
}

TEST(all_of_a_tensor_is_one_run_and_nothing_of_it_none) {
  CHECK((box_of(kBegin, {}, 32, {}).runs == std::vector<StridedRun>{{kBegin, 4, 4, 1}}));
  CHECK(
      (box_of(kBegin, {2, 3}, 32, {{{0, 1}, {1, 2}}, {{0, 3}}}).runs == std::vector<StridedRun>{{kBegin, 24, 24, 1}}));
  const TensorBox box = box_of(kBegin, {2, 3}, 32, {{{0, 2}}, {}});
  CHECK((box.shape == std::vector<uint64_t>{2, 0}) && box.runs.empty());
}

TEST(runs_have_the_bytes_of_a_box_in_the_order_of_its_indices) {
  std::mt19937 random(7);
  const auto below = [&](uint64_t most) { return random() % most; };
  for (int round = 0; round < 4000; ++round) {
    std::vector<uint64_t> shape;
    std::vector<IndexRanges> wanted;
    for (uint64_t d = below(5); d > 0; --d) {
      const uint64_t size = 1 + below(6);
      shape.push_back(size);
      IndexRanges ranges;
      for (uint64_t n = below(4) == 0 ? 1 + below(3) : 1; n > 0; --n) {
        const uint64_t begin = below(3) == 0 ? 0 : below(size);
        const uint64_t end = below(2) == 0 ? size : begin + below(size - begin + 1);
        ranges.emplace_back(begin, end);
      }
      wanted.push_back(ranges);
    }
    const TensorBox box = box_of(kBegin, shape, 16, wanted);
    CHECK(bytes_by_run(box) == bytes_by_index(shape, 2, wanted));
    for (const StridedRun& run : box.runs) {
      CHECK(run.count >= 1 && run.piece > 0 && run.stride >= run.piece);
      CHECK(run.span().size() == run.stride * (run.count - 1) + run.piece);
    }
  }
}

TEST(boxes_that_are_not_in_their_tensor_are_refused) {
  CHECK(is_refused({4}, 8, {{{0, 5}}}));
  CHECK(is_refused({4}, 8, {{{3, 2}}}));
  CHECK(is_refused({4}, 8, {{{UINT64_MAX, UINT64_MAX}}}));
  CHECK(is_refused({4, 2}, 8, {{{0, 4}}}));
  CHECK(is_refused({4, 4}, 4, {{{0, 4}}, {{1, 3}}}));  // elements of half a byte
  CHECK(!is_refused({4, 4}, 4, {{{0, 4}}, {{2, 4}}}));
}
