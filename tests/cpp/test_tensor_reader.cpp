#include "load/tensor_reader.h"

#include <cstring>

#include "base/error.h"
#include "check.h"
#include "checkpoint.h"
#include "one_hash.h"

using namespace weightload;

namespace {

constexpr uint64_t kRow = 10, kRows = 1000;

// One tensor of a thousand rows.
struct Rows {
  Rows() : temporary(3, {kRow * kRows}) {
    const auto opened = CheckpointFile::open(temporary.path);
    TensorInfo info = opened->header().tensors.at(0);
    info.shape = {kRows, kRow};
    begin = info.bytes.begin;
    file = opened->with_tensors({info});
  }
  bool is_right(const TensorInMemory& part, uint64_t first_row, uint64_t bytes) const {
    for (uint64_t i = 0; i < bytes; ++i) {
      if (static_cast<unsigned char>(part.data[i]) != byte_at(3, begin + first_row * kRow + i)) return false;
    }
    return true;
  }

  TemporaryFile temporary;
  std::shared_ptr<const CheckpointFile> file;
  uint64_t begin = 0;
};

const auto kNoPause = [] {};

}  // namespace

TEST(every_byte_of_a_mapping_is_given_once) {
  const Rows rows;
  TensorReader reader(rows.file);
  std::vector<bool> given(kRows);
  uint64_t random = 1;
  for (int turn = 0; turn < 4000; ++turn) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    const uint64_t first = (random >> 33) % kRows, last = std::min(kRows, first + (random >> 60));
    const RowRange range{first, last};
    bool free = true;
    for (uint64_t row = first; row < last; ++row) free = free && !given[row];
    const auto view = reader.first_view(0, &range);
    CHECK(view.has_value() == free);
    if (!view) continue;
    CHECK(rows.is_right(*view, first, (last - first) * kRow));
    for (uint64_t row = first; row < last; ++row) given[row] = true;
  }
}

TEST(a_tensor_that_was_given_comes_from_another_mapping) {
  const Rows rows;
  TensorReader reader(rows.file);
  const auto first = reader.first_view(0, nullptr);
  CHECK(first.has_value());
  std::memset(first->data, 7, kRow);
  CHECK(!reader.first_view(0, nullptr));
  const TensorInMemory second = reader.view_again(0);
  CHECK(rows.is_right(second, 0, kRow * kRows));
  CHECK(!reader.first_view(0, nullptr));
  TensorReader other(rows.file);
  const RowRange early{0, 5}, late{5, 9};
  CHECK(other.first_view(0, &early).has_value() && other.first_view(0, &late).has_value());
  CHECK(rows.is_right(reader.read(0, nullptr, kNoPause), 0, kRow * kRows));
}

TEST(rows_are_read_one_behind_the_other) {
  const Rows rows;
  const TensorReader reader(rows.file);
  const std::vector<RowRange> ranges{{990, 1000}, {0, 1}, {5, 5}, {500, 600}};
  const TensorInMemory part = reader.read(0, &ranges, kNoPause);
  CHECK(part.info.shape.at(0) == 111u);
  CHECK(part.info.bytes.size() == 111 * kRow);
  CHECK(rows.is_right(part, 990, 10 * kRow));
  CHECK(rows.is_right({part.info, part.data + 10 * kRow, part.memory}, 0, kRow));
  CHECK(rows.is_right({part.info, part.data + 11 * kRow, part.memory}, 500, 100 * kRow));
}

TEST(rows_that_are_not_there_are_refused) {
  const Rows rows;
  const TensorReader reader(rows.file);
  for (const RowRange& range : std::vector<RowRange>{{0, 1001}, {5, 4}, {UINT64_MAX, UINT64_MAX}}) {
    try {
      reader.narrowed(0, range);
      CHECK(false);
    } catch (const Error& error) {
      CHECK(error.kind == ErrorKind::tensor);
    }
  }
}

TEST(names_are_found_also_among_names_of_one_hash) {
  const Rows rows;
  std::vector<std::string> names, absent;
  for (const std::string& name : names_of_one_hash(9)) (names.size() > absent.size() ? absent : names).push_back(name);
  names.insert(names.end(), {"", "a", "b", std::string("a\0", 2)});
  std::vector<TensorInfo> tensors;
  for (const std::string& name : names) tensors.push_back({name, Dtype::U8, {1}, {rows.begin, rows.begin + 1}});
  const TensorReader reader(rows.file->with_tensors(tensors));
  for (uint32_t i = 0; i < names.size(); ++i) CHECK(reader.find(names[i]).value() == i);
  CHECK(!reader.find("c"));
  for (const std::string& name : absent) CHECK(!reader.find(name));
  CHECK(!reader.find(names[0] + "x"));
}
