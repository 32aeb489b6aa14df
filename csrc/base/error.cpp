#include "base/error.h"

#include <cstring>
#include <utility>

namespace weightload {
namespace {

std::string full_sentence(const std::string& message, const ErrorContext& context) {
  std::string text;
  if (context.rank) text += "on rank " + std::to_string(*context.rank) + ": ";
  if (!context.path.empty()) text += printable(context.path) + ": ";
  if (!context.tensor.empty()) text += "tensor `" + printable(context.tensor) + "`: ";
  text += message;
  if (context.offset) text += " at byte " + std::to_string(*context.offset) + " of the file";
  if (context.error_number != 0) {
    char buffer[128];
    // The GNU strerror_r returns the text, which need not be in the buffer.
    text += ": " + std::string(strerror_r(context.error_number, buffer, sizeof(buffer))) + " (errno " +
            std::to_string(context.error_number) + ")";
  }
  return text;
}

}  // namespace

std::string printable(const std::string& text) {
  static const char* const kDigits = "0123456789abcdef";
  std::string result;
  result.reserve(text.size());
  for (const char character : text) {
    const auto code = static_cast<unsigned char>(character);
    if (code < 0x20 || code == 0x7f) {
      result += "\\x";
      result += kDigits[code >> 4];
      result += kDigits[code & 15];
    } else {
      result += character;
    }
  }
  return result;
}

Error::Error(ErrorKind what_kind, const std::string& what_happened, ErrorContext where, std::string broken_rule)
    : std::runtime_error(full_sentence(what_happened, where)),
      kind(what_kind),
      message(what_happened),
      context(std::move(where)),
      rule(std::move(broken_rule)) {}

}  // namespace weightload
