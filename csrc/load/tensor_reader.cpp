#include "load/tensor_reader.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "base/delete_unless_forked.h"
#include "base/error.h"
#include "base/fork_generation.h"
#include "base/of_this_process.h"
#include "page_cache/known_cached.h"
#include "page_cache/page_in.h"
#include "threads/pace.h"

namespace weightload {
namespace {

constexpr auto kBetweenPauses = std::chrono::milliseconds(100);

// Pieces of private memory: nothing tells in advance where the page cache ends and slow storage begins.
constexpr uint64_t kMostRead = 512 << 10;

// Calls `pause` where the last call was a while ago: taking Python's lock for every small tensor would show.
Look now_and_then(const Look& pause) {
  return [&pause, paused = std::chrono::steady_clock::now()]() mutable {
    const auto now = std::chrono::steady_clock::now();
    if (now - paused < kBetweenPauses) return;
    pause();
    paused = now;
  };
}

[[noreturn]] void fail_rows(const CheckpointFile& file, const TensorInfo& info, const std::string& what) {
  throw Error(ErrorKind::tensor, what, {file.path(), info.name, {}, 0});
}

// The same error, of this tensor.
Error of_tensor(const Error& error, const CheckpointFile& file, const TensorInfo& info) {
  return Error(error.kind, error.message, {file.path(), info.name, error.context.offset, error.context.error_number},
               error.rule);
}

// Of a vector, the last dimension, in which torch counts what holds several packed elements, is the first.
uint64_t elements_a_row(const TensorInfo& info) { return info.shape.size() == 1 ? dtype_pack(info.dtype) : 1; }

}  // namespace

// All that changes, which a forked child begins anew.
struct TensorReader::State {
  const uint32_t generation = fork_generation();

  struct Entry {
    size_t hash;
    uint32_t tensor;
  };
  std::once_flag indexing;
  std::vector<Entry> index;  // sorted by hash, then by name: see base/repeated_name.h for why it is no table

  Pace reading{Pace::kAnyNumber, kMostRead};  // to private memory
  Pace mapping_in;                            // of what was not in the page cache
  PagePrices mapping_prices{0.85};            // the same

  std::mutex asking;  // guards what follows, also while that waits for storage
  KnownCached known;

  std::mutex mapping;  // guards what follows; held for no longer than mapping takes
  HostMemoryRef map;
  std::map<uint64_t, uint64_t> given;  // bytes of map: begin and end of ranges that lie apart

  bool claim(ByteRange bytes);
};

TensorReader::TensorReader(std::shared_ptr<const CheckpointFile> file) : file_(std::move(file)), state_(new State) {}

TensorReader::~TensorReader() {
  State* const last = state_.load();
  DeleteUnlessForked{last->generation}(last);
}

TensorReader::State& TensorReader::state() const { return of_this_process(state_); }

std::optional<uint32_t> TensorReader::find(std::string_view name) const {
  const auto& tensors = file_->header().tensors;
  const std::hash<std::string_view> hash_of;
  using Entry = State::Entry;
  State& now = state();
  std::vector<Entry>& index = now.index;
  const auto before = [&](const Entry& entry, size_t hash, std::string_view text) {
    return entry.hash != hash ? entry.hash < hash : tensors[entry.tensor].name < text;
  };
  std::call_once(now.indexing, [&] {
    index.reserve(tensors.size());
    for (uint32_t i = 0; i < tensors.size(); ++i) index.push_back({hash_of(tensors[i].name), i});
    std::sort(index.begin(), index.end(),
              [&](const Entry& a, const Entry& b) { return before(a, b.hash, tensors[b.tensor].name); });
  });
  const size_t hash = hash_of(name);
  const auto found = std::lower_bound(index.begin(), index.end(), name,
                                      [&](const Entry& entry, std::string_view) { return before(entry, hash, name); });
  if (found == index.end() || found->hash != hash || tensors[found->tensor].name != name) return std::nullopt;
  return found->tensor;
}

bool TensorReader::can_map(uint32_t tensor) const {
  const TensorInfo& info = file_->header().tensors.at(tensor);
  return file_->can_map() && info.bytes.begin % dtype_alignment(info.dtype) == 0;
}

// With its mutex `mapping` held.
void TensorReader::map_anew(State& now) {
  now.map = map_file(file_->file()->descriptor().get(), file_->size(), file_->path());
  now.given.clear();
}

HostMemoryRef TensorReader::map() {
  State& now = state();
  std::lock_guard<std::mutex> lock(now.mapping);
  if (!now.map) map_anew(now);
  return now.map;
}

std::optional<bool> TensorReader::is_at_hand(ByteRange bytes, bool may_wait) {
  if (bytes.empty() || !file_->can_map()) return bytes.empty();
  State& now = state();
  std::unique_lock<std::mutex> lock(now.asking, std::try_to_lock);
  if (!lock && !may_wait) return std::nullopt;
  if (!lock) lock.lock();
  if (now.known.remembers(bytes)) return true;
  if (!may_wait && this->may_wait()) return std::nullopt;
  return now.known.contains(*file_->file(), map()->data(), bytes, may_wait);
}

void TensorReader::bring_in(uint32_t tensor, const std::vector<RowRange>* rows, const Look& pause) {
  const HostMemoryRef map = this->map();
  const Look look = now_and_then(pause);
  const auto bring = [&](ByteRange bytes) {
    if (!*is_at_hand(bytes, true)) {
      State& now = state();
      page_in_from_storage(*file_->file(), map->data(), bytes, now.mapping_in, now.mapping_prices, look);
    }
  };
  const TensorInfo& info = file_->header().tensors.at(tensor);
  try {
    if (!rows) return bring(info.bytes);
    for (const RowRange& range : *rows) bring(narrowed(tensor, range).bytes);
  } catch (const Error& error) {
    throw of_tensor(error, *file_, info);
  }
}

// False if any of these bytes have been given. Neighbours become one range: a file that is read in order takes one.
bool TensorReader::State::claim(ByteRange bytes) {
  auto next = given.lower_bound(bytes.begin);
  if (next != given.end() && next->first < bytes.end) return false;
  if (next != given.begin()) {
    const auto previous = std::prev(next);
    if (previous->second > bytes.begin) return false;
    if (previous->second == bytes.begin) {
      bytes.begin = previous->first;
      given.erase(previous);
    }
  }
  if (next != given.end() && next->first == bytes.end) {
    bytes.end = next->second;
    next = given.erase(next);
  }
  given.emplace_hint(next, bytes.begin, bytes.end);
  return true;
}

// Touching a view of bytes that are gone from the file would end the process, and a view of other bytes would be wrong.
void TensorReader::require_unchanged(const TensorInfo& info) const {
  try {
    file_->source().require_unchanged(info.bytes.begin);
  } catch (const Error& error) {
    throw of_tensor(error, *file_, info);
  }
}

std::optional<TensorInMemory> TensorReader::first_view(uint32_t tensor, const RowRange* rows) {
  TensorInfo info = rows ? narrowed(tensor, *rows) : file_->header().tensors.at(tensor);
  if (info.bytes.empty()) return TensorInMemory{std::move(info), nullptr, {}};
  require_unchanged(info);
  State& now = state();
  std::lock_guard<std::mutex> lock(now.mapping);
  if (!now.map) map_anew(now);
  if (!now.claim(info.bytes)) return std::nullopt;
  char* const data = now.map->data() + info.bytes.begin;
  return TensorInMemory{std::move(info), data, now.map};
}

TensorInMemory TensorReader::view_again(uint32_t tensor) {
  const TensorInfo& info = file_->header().tensors.at(tensor);
  require_unchanged(info);
  State& now = state();
  std::lock_guard<std::mutex> lock(now.mapping);
  map_anew(now);
  now.claim(info.bytes);
  return {info, now.map->data() + info.bytes.begin, now.map};
}

uint64_t TensorReader::row_count(uint32_t tensor) const {
  const TensorInfo& info = file_->header().tensors.at(tensor);
  if (info.shape.empty()) fail_rows(*file_, info, "cannot slice rows of a 0-d tensor");
  return info.shape.front() / elements_a_row(info);
}

TensorInfo TensorReader::narrowed(uint32_t tensor, RowRange rows) const {
  const uint64_t count = row_count(tensor);
  TensorInfo info = file_->header().tensors[tensor];
  if (rows.begin > rows.end || rows.end > count) fail_rows(*file_, info, "rows out of range");
  const uint64_t row = count == 0 ? 0 : info.bytes.size() / count;
  if (row * count != info.bytes.size()) fail_rows(*file_, info, "a row is not a whole number of bytes");
  info.shape.front() = (rows.end - rows.begin) * elements_a_row(info);
  info.bytes = {info.bytes.begin + rows.begin * row, info.bytes.begin + rows.end * row};
  return info;
}

TensorInMemory TensorReader::read(uint32_t tensor, const std::vector<RowRange>* rows, const Look& pause) const {
  const TensorInfo& whole = file_->header().tensors.at(tensor);
  TensorInMemory result{whole, nullptr, {}};
  std::vector<ByteRange> ranges{whole.bytes};
  if (rows) {
    ranges.clear();
    uint64_t bytes = 0, extent = 0;
    for (const RowRange& range : *rows) {
      const TensorInfo part = narrowed(tensor, range);
      ranges.push_back(part.bytes);
      bytes += part.bytes.size();
      extent += part.shape.front();
    }
    result.info.shape.at(0) = extent;
    result.info.bytes = {0, bytes};
  }
  if (result.info.bytes.empty()) return result;
  try {
    result.memory = allocate_block(result.info.bytes.size());
    result.data = result.memory->data();
    char* to = result.data;
    const Look look = now_and_then(pause);
    for (const ByteRange& range : ranges) {
      file_->read(range, to, state().reading, look);
      to += range.size();
    }
    file_->source().require_unchanged(ranges.front().begin);
  } catch (const Error& error) {
    throw of_tensor(error, *file_, whole);
  }
  return result;
}

}  // namespace weightload
