#include "header_rules.h"

#include <algorithm>
#include <iterator>
#include <set>

#include "require.h"

using namespace weightload;

namespace {

const char* const kRules[] = {
    rule::kHeaderTooSmall,
    rule::kHeaderTooLarge,
    rule::kInvalidHeaderLength,
    rule::kInvalidHeader,
    rule::kInvalidHeaderDeserialization,
    rule::kTensorInvalidInfo,
    rule::kInvalidOffset,
    rule::kMetadataIncompleteBuffer,
    rule::kValidationOverflow,
    rule::kMisalignedSlice,
    rule::kInvalidTensorEntry,
    rule::kInvalidMetadata,
    rule::kUnknownDtype,
    rule::kDuplicateField,
    rule::kDuplicateTensor,
    rule::kNestingTooDeep,
    rule::kGitLfsPointer,
    rule::kHtmlPage,
};

// Elements times bits must be the range's bits; in 128 bits, and refused where a partial product leaves 64.
void check_size(const TensorInfo& tensor) {
  __extension__ typedef unsigned __int128 Wide;
  constexpr Wide kLimit = Wide{1} << 64;
  Wide bits = 1;
  for (const uint64_t extent : tensor.shape) {
    bits *= extent;
    REQUIRE(bits < kLimit);
  }
  bits *= dtype_bits(tensor.dtype);
  REQUIRE(bits < kLimit);
  REQUIRE(bits == Wide{tensor.bytes.size()} * 8);
}

}  // namespace

void check_header(const Header& header, uint64_t header_bytes, uint64_t file_bytes) {
  REQUIRE(header_bytes <= kMaxHeaderBytes);
  REQUIRE(header.data_begin == kLengthBytes + header_bytes);
  REQUIRE(header.data_begin <= file_bytes);
  REQUIRE(header.has_metadata || header.metadata.empty());
  std::set<std::string> names;
  uint64_t position = header.data_begin;
  for (const TensorInfo& tensor : header.tensors) {
    REQUIRE(names.insert(tensor.name).second);
    REQUIRE(dtype_from_name(dtype_name(tensor.dtype)) == tensor.dtype);
    REQUIRE(tensor.bytes.begin == position);
    REQUIRE(tensor.bytes.end >= position);
    REQUIRE(tensor.bytes.end <= file_bytes);
    check_size(tensor);
    position = tensor.bytes.end;
  }
  REQUIRE(position == file_bytes);
}

void check_refusal(const Error& error, const std::string& path) {
  REQUIRE(error.kind == ErrorKind::header);
  REQUIRE(std::find(std::begin(kRules), std::end(kRules), error.rule) != std::end(kRules));
  REQUIRE(error.context.path == path);
  REQUIRE(std::string(error.what()).rfind(path + ": ", 0) == 0);
  REQUIRE(!error.message.empty());
}

void check_same_tensors(const Header& one, const Header& other) {
  REQUIRE(one.metadata == other.metadata && one.has_metadata == other.has_metadata);
  REQUIRE(one.tensors.size() == other.tensors.size());
  for (size_t i = 0; i < one.tensors.size(); ++i) {
    const TensorInfo& a = one.tensors[i];
    const TensorInfo& b = other.tensors[i];
    REQUIRE(a.name == b.name && a.dtype == b.dtype && a.shape == b.shape);
    REQUIRE(a.bytes.begin - one.data_begin == b.bytes.begin - other.data_begin);
    REQUIRE(a.bytes.size() == b.bytes.size());
  }
}
