#include "format/header_json.h"

#include <nlohmann/json.hpp>

#include "base/error.h"

namespace weightload {
namespace {

// serde_json, which safetensors parses with, refuses the 128th level; so do we, to give the same verdict.
constexpr int kMaxDepth = 127;

// The text of the shortest entry that writers make is about as long as this.
constexpr size_t kLeastEntryBytes = 64;

constexpr size_t kOrdinaryDimensions = 64;

// Receives the parser's events and fills a Header. A stack of states is not needed: the format is two levels
// deep, and values of unknown fields are only counted through (`skip_depth_`).
//
//   top --key--> tensor entry --"dtype"--> string
//    |                |--"shape"/"data_offsets"--> array of unsigned
//    |                '--other--> anything
//    '--"__metadata__"--> null, or map of strings
class HeaderSax final : public nlohmann::json_sax<nlohmann::json> {
 public:
  HeaderSax(const std::string& path, size_t text_bytes) : path_(path) {
    header_.tensors.reserve(text_bytes / kLeastEntryBytes);  // memory that is not used is not touched either
  }
  Header take() {
    // What was reserved for nothing is address space only, but that may be limited.
    if (header_.tensors.size() < header_.tensors.capacity() / 4) header_.tensors.shrink_to_fit();
    return std::move(header_);
  }

  bool null() override {
    if (where_ == Where::metadata_value) return where_ = Where::top, true;
    return other_value("null");
  }
  bool boolean(bool) override { return other_value("a boolean"); }
  bool number_integer(int64_t) override { return other_value("a negative number"); }
  bool number_float(double, const std::string&) override { return other_value("a floating point number"); }
  bool binary(nlohmann::json::binary_t&) override { return other_value("binary"); }

  bool number_unsigned(uint64_t value) override {
    if (where_ == Where::shape) return shape_.push_back(value), true;
    if (where_ == Where::offsets) {
      if (offsets_seen_ == 2) fail_entry("data_offsets must hold exactly two numbers");
      (offsets_seen_++ == 0 ? current().bytes.begin : current().bytes.end) = value;
      return true;
    }
    return other_value("a number");
  }

  bool string(std::string& value) override {
    if (where_ == Where::metadata_text) {
      header_.metadata.emplace_back(std::move(metadata_key_), std::move(value));
      return where_ = Where::metadata, true;
    }
    if (where_ == Where::dtype) {
      const auto dtype = dtype_from_name(value);
      if (!dtype) fail_header(rule::kUnknownDtype, "unknown dtype `" + printable(value) + "`", path_, current().name);
      current().dtype = *dtype;
      return where_ = Where::entry, true;
    }
    return other_value("a string");
  }

  bool start_object(size_t) override {
    descend();
    switch (where_) {
      case Where::start: return where_ = Where::top, true;
      case Where::metadata_value: return header_.has_metadata = true, where_ = Where::metadata, true;
      case Where::tensor_value: return fields_ = 0, where_ = Where::entry, true;
      default: return other_container("a map");
    }
  }

  bool key(std::string& name) override {
    switch (where_) {
      case Where::top:
        if (name == "__metadata__") {
          if (metadata_seen_) fail_header(rule::kDuplicateField, "duplicate field `__metadata__`", path_);
          metadata_seen_ = true;
          return where_ = Where::metadata_value, true;
        }
        header_.tensors.emplace_back().name.assign(
            name);  // not moved: the parser would have to let its buffer grow anew
        return where_ = Where::tensor_value, true;
      case Where::metadata: return metadata_key_ = std::move(name), where_ = Where::metadata_text, true;
      case Where::entry: return enter_field(name), true;
      default: return true;  // inside an ignored value
    }
  }

  bool end_object() override {
    --depth_;
    if (skip_depth_ > 0) return leave_skipped();
    if (where_ == Where::entry) {
      if (fields_ != (kDtype | kShape | kOffsets)) {
        fail_entry(!(fields_ & kDtype)   ? "missing field `dtype`"
                   : !(fields_ & kShape) ? "missing field `shape`"
                                         : "missing field `data_offsets`");
      }
      where_ = Where::top;
    } else if (where_ == Where::metadata) {
      where_ = Where::top;
    }
    return true;
  }

  bool start_array(size_t) override {
    descend();
    if (where_ == Where::shape_value) return shape_.clear(), where_ = Where::shape, true;
    if (where_ == Where::offsets_value) return offsets_seen_ = 0, where_ = Where::offsets, true;
    return other_container("a list");
  }

  bool end_array() override {
    --depth_;
    if (skip_depth_ > 0) return leave_skipped();
    if (where_ == Where::offsets && offsets_seen_ != 2) fail_entry("data_offsets must hold exactly two numbers");
    if (where_ == Where::shape) take_shape();
    where_ = Where::entry;
    return true;
  }

  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception& problem) override {
    const std::string text = problem.what();
    const std::string where = " at byte " + std::to_string(position) + " of the header";
    // Nothing in the library's interface but this wording tells bad UTF-8 from bad syntax.
    if (text.find("UTF-8") != std::string::npos)
      fail_header(rule::kInvalidHeader, "invalid UTF-8 in header" + where, path_);
    fail_header(rule::kInvalidHeaderDeserialization, "invalid JSON in header" + where, path_);
  }

 private:
  enum class Where : uint8_t {
    start,
    top,
    metadata_value,
    metadata,
    metadata_text,
    tensor_value,
    entry,
    dtype,
    shape_value,
    shape,
    offsets_value,
    offsets,
    ignored,
  };  // clang-format on
  static constexpr unsigned kDtype = 1, kShape = 2, kOffsets = 4;

  TensorInfo& current() { return header_.tensors.back(); }

  [[noreturn]] void fail_entry(const std::string& what) {
    fail_header(rule::kInvalidTensorEntry, what, path_, current().name);
  }

  // An allocation of the right size for it. A giant is not held twice.
  void take_shape() {
    if (shape_.size() > kOrdinaryDimensions) {
      current().shape = std::move(shape_);
    } else {
      current().shape.assign(shape_.begin(), shape_.end());
    }
  }

  void descend() {
    if (++depth_ > kMaxDepth) fail_header(rule::kNestingTooDeep, "recursion limit exceeded", path_);
  }

  void enter_field(const std::string& name) {
    const unsigned field = name == "dtype" ? kDtype : name == "shape" ? kShape : name == "data_offsets" ? kOffsets : 0;
    if (fields_ & field) fail_header(rule::kDuplicateField, "duplicate field `" + name + "`", path_, current().name);
    fields_ |= field;
    where_ = field == kDtype     ? Where::dtype
             : field == kShape   ? Where::shape_value
             : field == kOffsets ? Where::offsets_value
                                 : Where::ignored;
  }

  // A scalar that no field of the format takes: fine in an ignored field, an error elsewhere.
  bool other_value(const char* what) {
    if (where_ != Where::ignored) fail_misplaced(what);
    if (skip_depth_ == 0) where_ = Where::entry;
    return true;
  }

  bool other_container(const char* what) {
    if (where_ != Where::ignored) fail_misplaced(what);
    ++skip_depth_;
    return true;
  }

  bool leave_skipped() {
    if (--skip_depth_ == 0) where_ = Where::entry;
    return true;
  }

  [[noreturn]] void fail_misplaced(const char* what) {
    switch (where_) {
      case Where::metadata_value:
      case Where::metadata_text:
        fail_header(rule::kInvalidMetadata, std::string("__metadata__ must map strings to strings, found ") + what,
                    path_);
      case Where::start:
        fail_header(rule::kInvalidHeaderDeserialization, std::string("the header must be a map, found ") + what, path_);
      case Where::dtype: fail_entry(std::string("dtype must be a string, found ") + what);
      case Where::tensor_value: fail_entry(std::string("a tensor's entry must be a map, found ") + what);
      default: fail_entry(std::string("shape and data_offsets must be lists of unsigned integers, found ") + what);
    }
  }

  const std::string& path_;
  Header header_;
  Where where_ = Where::start;
  std::string metadata_key_;
  std::vector<uint64_t> shape_;  // of the current entry: one allocation of the right size each, when it is whole
  unsigned fields_ = 0;          // seen in the current entry
  int offsets_seen_ = 0;
  int depth_ = 0;
  int skip_depth_ = 0;  // containers open inside an ignored field
  bool metadata_seen_ = false;
};

}  // namespace

void fail_header(const char* rule_name, const std::string& what, const std::string& path, const std::string& tensor) {
  ErrorContext context;
  context.path = path;
  context.tensor = tensor;
  throw Error(ErrorKind::header, "Error while deserializing header: " + what, std::move(context), rule_name);
}

Header read_header_json(std::string_view json, const std::string& path) {
  // The library would skip a byte order mark; the format has none.
  if (json.substr(0, 3) == "\xEF\xBB\xBF")
    fail_header(rule::kInvalidHeaderDeserialization, "invalid JSON in header: byte order mark", path);
  // The library would take a zero byte for the end of the text, whatever follows. JSON has no place for one.
  if (json.find('\0') != std::string_view::npos)
    fail_header(rule::kInvalidHeaderDeserialization, "invalid JSON in header: zero byte", path);
  HeaderSax sax(path, json.size());
  nlohmann::json::sax_parse(json.data(), json.data() + json.size(), &sax);
  return sax.take();
}

}  // namespace weightload
