#include "format/header.h"

#include <algorithm>
#include <cctype>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/repeated_name.h"
#include "format/header_json.h"

namespace weightload {
namespace {

bool starts_with_ignoring_case(std::string_view text, std::string_view prefix) {
  return text.size() >= prefix.size() && std::equal(prefix.begin(), prefix.end(), text.begin(), [](char p, char t) {
           return p == std::tolower(static_cast<unsigned char>(t));
         });
}

// Downloads that went wrong leave these behind under the checkpoint's name.
void recognise_other_files(std::string_view first_bytes, const std::string& path) {
  if (starts_with_ignoring_case(first_bytes, "version https://git-lfs") ||
      starts_with_ignoring_case(first_bytes, "version https://hawser"))
    fail_header(rule::kGitLfsPointer, "this is a Git LFS pointer, not the file itself; run `git lfs pull`", path);
  // No header is so long that none of these is zero.
  if (first_bytes.size() < kLengthBytes || first_bytes.substr(0, kLengthBytes).find('\0') != std::string_view::npos)
    return;
  if (first_bytes.substr(0, 3) == "\xEF\xBB\xBF") first_bytes.remove_prefix(3);
  const size_t text = first_bytes.find_first_not_of(" \t\r\n");
  if (text != std::string_view::npos && first_bytes[text] == '<')
    fail_header(rule::kHtmlPage, "this is an HTML or XML page, not the file itself; download it again", path);
}

// What else a file with such first bytes may be, to be said behind the rule that it breaks; empty if nothing is known.
std::string what_it_may_be(std::string_view first_bytes) {
  static constexpr std::pair<std::string_view, const char*> kFormats[] = {
      {"PK\x03\x04", "a zip archive, as torch.save writes"},
      {"\x80\x02\x8a\x0a", "a pickle, as torch.save wrote before torch 1.6"},
      {"GGUF", "a GGUF file"},
      {"\x1f\x8b\x08", "a file compressed with gzip"},
      {"\x28\xb5\x2f\xfd", "a file compressed with zstd"},
      {"\x89HDF", "an HDF5 file"},
      {"\x93NUMPY", "a NumPy array"},
  };
  for (const auto& [magic, what] : kFormats) {
    if (first_bytes.substr(0, magic.size()) == magic) return std::string("; it looks like ") + what;
  }
  if (first_bytes.substr(0, kLengthBytes).find('\0') != std::string_view::npos) return "";
  const size_t text = first_bytes.find_first_not_of(" \t\r\n");
  if (text != std::string_view::npos && (first_bytes[text] == '{' || first_bytes[text] == '['))
    return "; it looks like JSON, such as a server's answer to a failed download, or an index, which "
           "resolve_safetensors_files() takes";
  return "";
}

bool multiply(uint64_t a, uint64_t b, uint64_t& product) { return !__builtin_mul_overflow(a, b, &product); }

// Size in bytes that dtype and shape call for.
uint64_t tensor_bytes(const TensorInfo& tensor, const std::string& path) {
  uint64_t elements = 1;
  uint64_t bits = 0;
  bool fits = true;
  for (uint64_t extent : tensor.shape) fits = fits && multiply(elements, extent, elements);
  if (!fits || !multiply(elements, dtype_bits(tensor.dtype), bits)) {
    fail_header(rule::kValidationOverflow, "overflow computing buffer size from shape and/or element type", path,
                tensor.name);
  }
  if (bits % 8 != 0) {
    fail_header(rule::kMisalignedSlice,
                "The slice is slicing for subbytes dtypes, and the slice does not end up at a byte boundary, this is "
                "invalid.",
                path, tensor.name);
  }
  return bits / 8;
}

void refuse_duplicates(const std::vector<TensorInfo>& tensors, const std::string& path) {
  std::vector<std::string_view> names;
  names.reserve(tensors.size());
  for (const TensorInfo& tensor : tensors) names.push_back(tensor.name);
  if (const auto repeated = first_repeated(names))
    fail_header(rule::kDuplicateTensor, "duplicate tensor name", path, tensors[*repeated].name);
}

}  // namespace

uint64_t check_header_length(std::string_view first_bytes, uint64_t file_bytes, const std::string& path) {
  recognise_other_files(first_bytes, path);
  if (file_bytes < kLengthBytes || first_bytes.size() < kLengthBytes)
    fail_header(rule::kHeaderTooSmall, "header too small", path);
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(first_bytes[static_cast<size_t>(i)]);
  if (length > kMaxHeaderBytes)
    fail_header(rule::kHeaderTooLarge, "header too large" + what_it_may_be(first_bytes), path);
  if (length > file_bytes - kLengthBytes)
    fail_header(rule::kInvalidHeaderLength, "invalid header length" + what_it_may_be(first_bytes), path);
  return length;
}

Header parse_header(std::string_view json, uint64_t file_bytes, const std::string& path) {
  Header header = read_header_json(json, path);
  refuse_duplicates(header.tensors, path);

  const auto by_offset = [](const TensorInfo& a, const TensorInfo& b) {
    return a.bytes.begin != b.bytes.begin ? a.bytes.begin < b.bytes.begin : a.bytes.end < b.bytes.end;
  };
  if (!std::is_sorted(header.tensors.begin(), header.tensors.end(), by_offset))
    std::stable_sort(header.tensors.begin(), header.tensors.end(), by_offset);

  header.data_begin = kLengthBytes + json.size();
  uint64_t position = 0;  // relative to data_begin, as in the header
  for (TensorInfo& tensor : header.tensors) {
    if (tensor.bytes.begin != position || tensor.bytes.end < position)
      fail_header(rule::kInvalidOffset, "invalid offset for tensor `" + printable(tensor.name) + "`", path,
                  tensor.name);
    if (tensor.bytes.size() != tensor_bytes(tensor, path))
      fail_header(rule::kTensorInvalidInfo, "invalid shape, data type, or offset for tensor", path, tensor.name);
    position = tensor.bytes.end;
  }
  // The sum is compared, not added up: `position` may be any 64-bit number.
  if (position != file_bytes - header.data_begin) {
    fail_header(rule::kMetadataIncompleteBuffer,
                "incomplete metadata, file not fully covered: tensors of " + std::to_string(position) + " bytes, and " +
                    std::to_string(file_bytes - header.data_begin) + " behind the header",
                path);
  }
  for (TensorInfo& tensor : header.tensors) {
    tensor.bytes.begin += header.data_begin;
    tensor.bytes.end += header.data_begin;
  }
  return header;
}

}  // namespace weightload
