// The fuzz target: any bytes as a file, and every file that is accepted through the plans of a load.
#include <algorithm>
#include <memory>
#include <optional>
#include <string>

#include "checkpoint/checkpoint_file.h"
#include "header_rules.h"
#include "input.h"
#include "peak_memory.h"
#include "plan_rules.h"
#include "require.h"

using namespace weightload;

namespace {

// Memory of a header in bytes for each byte of its file, and for none. Entries of 50 bytes become 80 of TensorInfo in
// a vector that doubles; the worst measured is below half of this.
constexpr uint64_t kMostMemory = 32;
constexpr uint64_t kLeastMemory = 16 << 10;

constexpr size_t kPadding = 70'000;  // makes a header longer than what is read in one go

std::optional<Header> parse(std::string_view file) {
  const PeakMemory memory;
  std::optional<Header> header;
  try {
    header = CheckpointFile::from_memory(file.data(), file.size())->header();
  } catch (const Error& error) {
    check_refusal(error, "<bytes>");
  }
  REQUIRE(memory.bytes() <= kMostMemory * file.size() + kLeastMemory);
  return header;
}

// Sparse files end far behind their last byte. CheckpointFile has only memory and real files, so its two steps.
std::optional<Header> parse_sparse(std::string_view start, uint64_t file_bytes) {
  const PeakMemory memory;
  std::optional<Header> header;
  try {
    const uint64_t length = check_header_length(start, file_bytes, "sparse");
    REQUIRE(length <= kMaxHeaderBytes && length <= file_bytes - kLengthBytes);
    if (length > start.size() - kLengthBytes) return header;
    header = parse_header(start.substr(kLengthBytes, length), file_bytes, "sparse");
  } catch (const Error& error) {
    check_refusal(error, "sparse");
  }
  REQUIRE(memory.bytes() <= kMostMemory * start.size() + kLeastMemory);
  return header;
}

uint64_t header_length(std::string_view file) {
  uint64_t length = 0;
  for (size_t i = kLengthBytes; i-- > 0;) length = length << 8 | static_cast<unsigned char>(file[i]);
  return length;
}

// Spaces behind the JSON are allowed, and lead down the path of headers that are longer than the first read.
void padding_changes_nothing(std::string_view file, const std::optional<Header>& header) {
  if (file.size() < kLengthBytes || header_length(file) > file.size() - kLengthBytes) return;
  const uint64_t length = header_length(file);
  std::string padded;
  for (uint64_t i = 0; i < kLengthBytes; ++i) padded += static_cast<char>((length + kPadding) >> 8 * i & 0xff);
  padded += file.substr(kLengthBytes, length);
  padded.append(kPadding, ' ');
  padded += file.substr(kLengthBytes + length);
  const std::optional<Header> again = parse(padded);
  REQUIRE(again.has_value() == header.has_value());
  if (header) check_same_tensors(*header, *again);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const Input input = read_input({reinterpret_cast<const char*>(data), size});
  // Bytes of its own, of exactly this size: reading past them is then seen.
  const std::unique_ptr<char[]> copy(new char[input.file.size()]);
  std::copy(input.file.begin(), input.file.end(), copy.get());
  const std::string_view file(copy.get(), input.file.size());

  const bool sparse = input.choices.more_bytes > 0;
  const std::optional<Header> header = sparse ? parse_sparse(file, input.file_bytes()) : parse(file);
  if (!sparse && input.choices.has(Choices::kPad)) padding_changes_nothing(file, header);
  if (!header) return 0;
  check_header(*header, header_length(file), input.file_bytes());
  check_plans(*header, input.choices);
  return 0;
}
