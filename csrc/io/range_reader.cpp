#include "io/range_reader.h"

#include <optional>

#include "io/page_in.h"
#include "io/residency.h"

namespace weightload {
namespace {

// Residency is asked of three samples: asking of every page costs 34 ns a page, a tenth of reading it.
constexpr uint64_t kSample = 64 << 10;

// Whether most of the range is in the page cache; nothing where that cannot be told.
std::optional<bool> is_cached(const File& file, ByteRange range, char* mapping) {
  if (range.size() <= 3 * kSample) {
    const auto cached = cached_bytes(file, range, mapping);
    if (!cached) return seems_cached(file, range, mapping);
    return *cached * 2 >= range.size();
  }
  int samples = 0;
  for (uint64_t begin : {range.begin, range.begin + (range.size() - kSample) / 2, range.end - kSample}) {
    const auto cached = cached_bytes(file, {begin, begin + kSample}, mapping);
    if (!cached) return seems_cached(file, range, mapping);
    if (*cached * 2 >= kSample) ++samples;
  }
  return samples >= 2;
}

}  // namespace

RangeReader::RangeReader(const ByteSource& source, const File* file, ReadMode mode, ReadInto memory, FileCounts& counts)
    : source_(source), file_(file), mode_(mode), memory_(memory), counts_(counts) {
  if (file) storage_ = storage_of(*file);
}

bool RangeReader::can_be_direct() {
  if (mode_ == ReadMode::buffered || !file_) return false;
  std::call_once(opened_, [this] {
    direct_ = DirectFile::open(*file_, mode_ == ReadMode::direct);
    direct_works_ = direct_ != nullptr;
    if (mode_ == ReadMode::automatic && direct_) rates_ = &ReadRates::of(*file_, memory_);
  });
  return direct_works_.load(std::memory_order_relaxed);
}

RangeReader::Attempt RangeReader::begin(ByteRange range, bool may_be_direct) {
  Attempt attempt{range, false, false, std::chrono::steady_clock::now()};
  may_be_direct = may_be_direct && can_be_direct();
  attempt.direct = mode_ == ReadMode::direct && may_be_direct;
  if (attempt.direct || !file_ || storage_ == Storage::memory) return attempt;
  const std::optional<bool> cached = is_cached(*file_, range, mapping_);
  attempt.timed = cached == false && may_be_direct;
  attempt.direct = attempt.timed && rates_->choose_direct();
  // Where nobody knows, going past what may be in memory would be the dearer mistake.
  if (cached != true && !attempt.direct && mapping_) fill_page_cache(*file_, mapping_, range);
  return attempt;
}

bool RangeReader::direct(Attempt& attempt, char* destination) {
  return attempt.direct && was_direct(attempt, direct_->read(attempt.range, destination));
}

bool RangeReader::direct_within(Attempt& attempt, char* destination) {
  return attempt.direct && was_direct(attempt, direct_->read_within(attempt.range, destination));
}

bool RangeReader::was_direct(Attempt& attempt, bool read) {
  attempt.direct = read;
  if (read) {
    counts_.direct_bytes += attempt.range.size();
  } else {
    direct_works_ = false;
    attempt.timed = false;  // what follows has lost time, and finds the page cache empty
  }
  return read;
}

void RangeReader::buffered(ByteRange part, char* destination) {
  source_.read(part.begin, destination, static_cast<size_t>(part.size()));
  counts_.buffered_bytes += part.size();
}

void RangeReader::end(const Attempt& attempt) {
  if (!attempt.timed) return;
  const std::chrono::nanoseconds elapsed = std::chrono::steady_clock::now() - attempt.begin;
  rates_->record(attempt.direct, attempt.range.size(), static_cast<uint64_t>(elapsed.count()));
}

}  // namespace weightload
