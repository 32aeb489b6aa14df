#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/byte_range.h"
#include "format/dtype.h"

namespace weightload {

// A safetensors file is: 8 bytes little-endian header length N, N bytes of JSON, then the tensors' bytes.
inline constexpr uint64_t kLengthBytes = 8;
inline constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit that safetensors enforces

struct TensorInfo {
  std::string name;
  Dtype dtype = Dtype::U8;
  std::vector<uint64_t> shape;  // in elements; empty for a scalar
  ByteRange bytes;              // from the start of the file
};

// A header that passed every rule of safetensors 0.8, and its own: csrc/notes/headers_and_plans.md has the differences.
// Tensors lie one behind the other, in this order, from `data_begin` to the end of the file, without gap or overlap.
struct Header {
  std::vector<TensorInfo> tensors;  // sorted by offset; equal (empty) ranges keep the header's order
  std::vector<std::pair<std::string, std::string>> metadata;
  bool has_metadata = false;
  uint64_t data_begin = 0;  // 8 + header length
};

// The rules of the format, one name each. The names of the first block are those of safetensors' own errors.
namespace rule {
inline constexpr const char* kHeaderTooSmall = "HeaderTooSmall";
inline constexpr const char* kHeaderTooLarge = "HeaderTooLarge";
inline constexpr const char* kInvalidHeaderLength = "InvalidHeaderLength";
inline constexpr const char* kInvalidHeader = "InvalidHeader";                                // not UTF-8
inline constexpr const char* kInvalidHeaderDeserialization = "InvalidHeaderDeserialization";  // not JSON
inline constexpr const char* kTensorInvalidInfo = "TensorInvalidInfo";  // dtype x shape is not the range's size
inline constexpr const char* kInvalidOffset = "InvalidOffset";          // gap, overlap or end before begin
inline constexpr const char* kMetadataIncompleteBuffer = "MetadataIncompleteBuffer";  // bytes missing or left over
inline constexpr const char* kValidationOverflow = "ValidationOverflow";
inline constexpr const char* kMisalignedSlice = "MisalignedSlice";  // packed elements that end inside a byte

inline constexpr const char* kInvalidTensorEntry = "InvalidTensorEntry";  // a field missing or of the wrong type
inline constexpr const char* kInvalidMetadata = "InvalidMetadata";        // not a map of strings to strings
inline constexpr const char* kUnknownDtype = "UnknownDtype";
inline constexpr const char* kDuplicateField = "DuplicateField";
inline constexpr const char* kDuplicateTensor = "DuplicateTensor";
inline constexpr const char* kNestingTooDeep = "NestingTooDeep";
inline constexpr const char* kNotARegularFile = "NotARegularFile";
inline constexpr const char* kGitLfsPointer = "GitLfsPointer";
inline constexpr const char* kHtmlPage = "HtmlPage";
}  // namespace rule

// Checks the length field. `first_bytes` are the file's first bytes (up to 8 are looked at for the length,
// all of them to recognise files that are something else altogether). Returns the header's length in bytes.
uint64_t check_header_length(std::string_view first_bytes, uint64_t file_bytes, const std::string& path);

// Parses and validates the JSON of a file of `file_bytes` bytes. Throws Error{ErrorKind::header} whose `rule`
// is one of the names above. `path` only serves the message. Pure: no I/O, memory bounded by a small multiple
// of the text, no recursion whatever the input.
Header parse_header(std::string_view json, uint64_t file_bytes, const std::string& path);

}  // namespace weightload
