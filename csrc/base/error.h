#pragma once
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace weightload {

// What kind of Python exception an Error becomes (weightload/errors.py has the table).
enum class ErrorKind : uint8_t {
  header,         // the file breaks a rule of the format; `rule` names it
  tensor,         // one tensor cannot be handed out (dtype unknown to torch, sizes torch cannot hold)
  open,           // a system call on the way to an open file failed: the builtin OSError for that errno
  read,           // bytes could not be read, or the file ended early
  memory,         // host memory could not be had
  device_memory,  // an accelerator's memory could not be had
  group,          // the ranks of a group could not agree or communicate
  left,           // another rank has left the load
  checksum,       // a file is not what its digest says
  usage,          // a call that makes no sense in this state (an iterator used in a forked child, ...)
};

// Everything an error can say about where it happened. Empty fields are not known or do not apply.
struct ErrorContext {
  std::string path;
  std::string tensor;
  std::optional<uint64_t> offset;               // bytes from the start of the file
  int error_number = 0;                         // errno
  std::optional<uint32_t> rank = std::nullopt;  // in its group, of an error that all ranks raise
};

// Text of a file's, for messages: the bytes of control characters (line breaks, what steers a terminal or the direction
// of writing, the zero that ends a C string) as \xNN.
std::string printable(const std::string& text);

// The one exception type of the core. what() is a full sentence with file, tensor, offset and errno in it;
// the fields carry the same facts for programs.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind what_kind, const std::string& what_happened, ErrorContext where = {}, std::string broken_rule = {});

  ErrorKind kind;
  std::string message;  // without the context
  ErrorContext context;
  std::string rule;  // the broken rule of the format, e.g. "HeaderTooSmall"; empty for other kinds
};

}  // namespace weightload
