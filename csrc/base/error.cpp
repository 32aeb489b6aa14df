#include "base/error.h"

#include <cstring>
#include <utility>

namespace weightload {
namespace {

std::string full_sentence(const std::string& message, const ErrorContext& context) {
  std::string text;
  if (context.rank) text += "on rank " + std::to_string(*context.rank) + ": ";
  if (!context.path.empty()) text += context.path + ": ";
  if (!context.tensor.empty()) text += "tensor `" + context.tensor + "`: ";
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

Error::Error(ErrorKind what_kind, const std::string& what_happened, ErrorContext where, std::string broken_rule)
    : std::runtime_error(full_sentence(what_happened, where)),
      kind(what_kind),
      message(what_happened),
      context(std::move(where)),
      rule(std::move(broken_rule)) {}

}  // namespace weightload
