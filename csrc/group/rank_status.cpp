#include "group/rank_status.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace weightload {
namespace {

enum class State : uint8_t { ready = 1, failed, left };

constexpr uint32_t kNoFile = UINT32_MAX;
constexpr size_t kTextBytes = 256;
constexpr size_t kPathBytes = 448;

// As it travels. Ranks of one group run the same build (they have agreed on that), so the layout is the same.
struct Status {
  State state = State::ready;
  ErrorKind kind = ErrorKind::read;
  uint8_t has_offset = 0;
  int32_t error_number = 0;
  uint32_t file = kNoFile;
  uint64_t offset = 0;
  char tensor[kTextBytes] = {};
  char message[kTextBytes] = {};
  char path[kPathBytes] = {};  // the rank's own; empty if it is longer
};
static_assert(std::is_trivially_copyable_v<Status> && sizeof(Status) <= kStatusBytes);

std::string record_of(const Status& status) {
  std::string record(kStatusBytes, '\0');
  std::memcpy(record.data(), &status, sizeof(status));
  return record;
}

// Without a torn UTF-8 character at the end.
template <size_t kBytes>
void put(char (&field)[kBytes], const std::string& text) {
  size_t size = std::min(text.size(), kBytes - 1);
  while (size > 0 && size < text.size() && (static_cast<unsigned char>(text[size]) & 0xC0) == 0x80) --size;
  std::memcpy(field, text.data(), size);
}

template <size_t kBytes>
std::string text_of(const char (&field)[kBytes]) {
  return std::string(field, ::strnlen(field, kBytes));
}

}  // namespace

std::string ready_status() { return record_of({}); }

std::string left_status() {
  Status status;
  status.state = State::left;
  return record_of(status);
}

std::string failed_status(const Error& error, const std::vector<std::string>& paths) {
  Status status;
  status.state = State::failed;
  status.kind = error.kind;
  status.error_number = error.context.error_number;
  status.has_offset = error.context.offset.has_value();
  status.offset = error.context.offset.value_or(0);
  for (uint32_t f = 0; f < paths.size(); ++f) {
    if (paths[f] == error.context.path) status.file = f;
  }
  if (error.context.path.size() < kPathBytes) put(status.path, error.context.path);
  put(status.tensor, error.context.tensor);
  put(status.message, error.message);
  return record_of(status);
}

std::optional<Error> error_of_status(const std::string& record, uint32_t rank, const std::vector<std::string>& paths) {
  Status status;
  std::memcpy(&status, record.data(), sizeof(status));
  if (status.state == State::ready) return std::nullopt;
  ErrorContext where;
  where.rank = rank;
  if (status.state == State::left) {
    return Error(ErrorKind::left, "the rank has left the load (its iterator was closed, or its consumer failed)",
                 where);
  }
  where.error_number = status.error_number;
  if (status.has_offset) where.offset = status.offset;
  where.path = text_of(status.path);
  if (where.path.empty() && status.file < paths.size()) where.path = paths[status.file];
  where.tensor = text_of(status.tensor);
  return Error(status.kind, text_of(status.message), where);
}

}  // namespace weightload
