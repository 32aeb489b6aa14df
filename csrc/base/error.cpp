#include "base/error.h"

#include <cstring>
#include <string_view>
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

// Bytes of the control character that a text in UTF-8 begins with; 0 where it begins with another.
size_t control_bytes(std::string_view text) {
  const auto byte = [&](size_t at) { return at < text.size() ? static_cast<unsigned char>(text[at]) : 0u; };
  const auto within = [](unsigned value, unsigned first, unsigned last) { return value >= first && value <= last; };
  if (byte(0) < 0x20 || byte(0) == 0x7f) return 1;
  if (byte(0) == 0xc2 && within(byte(1), 0x80, 0x9f)) return 2;  // U+0080 to 9F: a terminal's escapes in one character
  if (byte(0) == 0xd8 && byte(1) == 0x9c) return 2;              // U+061C
  // U+200E and F, 2028 to 202E, 2066 to 2069: line breaks, and the direction of writing
  if (byte(0) != 0xe2) return 0;
  if (byte(1) == 0x80 && (within(byte(2), 0x8e, 0x8f) || within(byte(2), 0xa8, 0xae))) return 3;
  return byte(1) == 0x81 && within(byte(2), 0xa6, 0xa9) ? 3 : 0;
}

}  // namespace

std::string printable(const std::string& text) {
  static const char* const kDigits = "0123456789abcdef";
  std::string result;
  result.reserve(text.size());
  size_t escaped = 0;  // bytes before this are
  for (size_t at = 0; at < text.size(); ++at) {
    if (at >= escaped) escaped = at + control_bytes(std::string_view(text).substr(at));
    if (at < escaped) {
      const auto code = static_cast<unsigned char>(text[at]);
      result += "\\x";
      result += kDigits[code >> 4];
      result += kDigits[code & 15];
    } else {
      result += text[at];
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
