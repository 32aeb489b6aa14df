#include "read/range_reader.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "page_cache/cached_runs.h"
#include "page_cache/residency.h"

namespace weightload {
namespace {

// Residency is asked of three samples: asking of every page costs 34 ns a page, a tenth of reading it.
constexpr uint64_t kSample = 64 << 10;

constexpr uint64_t kLeastToFill = 4 << 20;

// Whether most of the range is in the page cache; nothing where that cannot be told.
std::optional<bool> is_cached(const File& file, ByteRange range) {
  if (range.size() <= 3 * kSample) {
    const auto cached = cached_bytes(file, range);
    if (!cached) return seems_cached(file, range);
    return *cached * 2 >= range.size();
  }
  int samples = 0;
  for (uint64_t begin : {range.begin, range.begin + (range.size() - kSample) / 2, range.end - kSample}) {
    const auto cached = cached_bytes(file, {begin, begin + kSample});
    if (!cached) return seems_cached(file, range);
    if (*cached * 2 >= kSample) ++samples;
  }
  return samples >= 2;
}

}  // namespace

RangeReader::RangeReader(const ByteSource& source, const File* file, const ByteTap* tap, ReadMode mode, ReadInto memory,
                         FileCounts& counts, Pace& pace, CacheFiller& filler, LoadMappings& mappings)
    : source_(source),
      file_(file),
      tap_(tap),
      mode_(mode),
      memory_(memory),
      counts_(counts),
      pace_(pace),
      filler_(filler),
      mappings_(mappings) {
  if (file) storage_ = storage_of(*file);
}

bool RangeReader::can_be_direct() {
  if (mode_ == ReadMode::buffered || !file_) return false;
  const std::lock_guard<std::mutex> lock(opening_);
  if (!opened_) {
    direct_ = DirectFile::open(*file_, mode_ == ReadMode::direct);
    direct_works_ = direct_ != nullptr;
    if (mode_ == ReadMode::automatic && direct_) rates_ = &ReadRates::of(*file_, memory_);
    opened_ = true;
  }
  return direct_works_.load(std::memory_order_relaxed);
}

// All that is read waits for nothing.
bool RangeReader::is_in_memory() const { return file_ ? storage_ == Storage::memory : !source_.is_remote(); }

// A page's fault reads twice a huge page.
bool RangeReader::may_fill() const { return storage_ != Storage::user_space && pace_.allows(kLeastToFill); }

RangeReader::Attempt RangeReader::begin(ByteRange range, const Look& look, bool may_be_direct) {
  Attempt attempt{range, look};
  may_be_direct = may_be_direct && can_be_direct();
  attempt.direct = mode_ == ReadMode::direct && may_be_direct;
  attempt.cached = is_in_memory();
  if (attempt.direct || attempt.cached || !file_) return attempt;
  const std::optional<bool> cached = is_cached(*file_, range);
  attempt.cached = cached == true;
  // Not while storage is got to know in small pieces.
  attempt.timed = cached == false && may_be_direct && rates_ && pace_.allows(range.size());
  attempt.direct = cached == false && may_be_direct && (!rates_ || rates_->choose_direct());
  // Where nobody knows, going past what may be in memory would be the dearer mistake.
  if (attempt.cached || attempt.direct || !may_fill()) return attempt;
  attempt.into_cache = filler_.prices().choose(range.size());
  if (attempt.into_cache == Pages::single) return attempt;  // the read brings them in
  attempt.cached = true;
  pace_.in_pieces(range, look, [&](ByteRange piece) {
    attempt.cached &= may_fill() && filler_.fill(*file_, piece, cached.has_value());
  });
  return attempt;
}

RangeReader::Attempt RangeReader::begin_scattered(ByteRange range, const Look& look) const {
  Attempt attempt{range, look};
  attempt.cached = is_in_memory() || (file_ && is_cached(*file_, range) == true);
  return attempt;
}

bool RangeReader::direct(Attempt& attempt, ByteRange part, char* destination) {
  return attempt.direct &&
         was_direct(attempt, part, destination, direct_->read(part, destination, pace_, attempt.look));
}

bool RangeReader::direct_within(Attempt& attempt, char* destination) {
  const auto read = [&] { return direct_->read_within(attempt.range, destination, pace_, attempt.look); };
  return attempt.direct && was_direct(attempt, attempt.range, destination, read());
}

bool RangeReader::was_direct(Attempt& attempt, ByteRange part, const char* destination, std::optional<uint64_t> got) {
  attempt.direct = got.has_value();
  if (got) {
    counts_.direct_bytes += part.size();
    counts_.rounded_bytes += *got - part.size();
    tell(attempt, part, destination);
  } else {
    direct_works_ = false;
    attempt.timed = false;  // what follows has lost time, and finds the page cache empty
  }
  return attempt.direct;
}

void RangeReader::buffered(Attempt& attempt, ByteRange part, char* destination, bool past_caches) {
  const auto place_of = [&](ByteRange piece) { return destination + (piece.begin - part.begin); };
  past_caches = past_caches && may_copy(attempt);
  const auto from_cache = [&](ByteRange run) {
    for (uint64_t at = run.begin; at < run.end;) {
      const ByteRange told{at, tap_ ? std::min(run.end, at + tap_->piece()) : run.end};
      at = told.end;
      pace_.in_cached_pieces(told, attempt.look, [&](ByteRange piece) {
        if (past_caches && attempt.copy->read(piece, place_of(piece))) return;
        source_.read(piece.begin, place_of(piece), static_cast<size_t>(piece.size()));
      });
      tell_later(attempt, told, place_of(told));  // what the tap takes is no time of the storage's
    }
  };
  const auto from_storage = [&](ByteRange run) {
    read_in_pieces(source_, run, place_of(run), pace_, attempt.look);
    tell_later(attempt, run, place_of(run));
  };
  if (attempt.cached) {
    from_cache(part);
  } else if (pace_.allows(part.size()) || !file_) {
    from_storage(part);
  } else {
    by_residency(*file_, part, from_cache, from_storage);
  }
  counts_.buffered_bytes += part.size();
}

// What it takes is no time of the reading's.
void RangeReader::tell(Attempt& attempt, ByteRange range, const char* bytes) const {
  if (!tap_) return;
  const auto begin = std::chrono::steady_clock::now();
  for (uint64_t at = range.begin; at < range.end;) {
    attempt.look();
    const auto count = static_cast<size_t>(std::min<uint64_t>(tap_->piece(), range.end - at));
    tap_->take(at, bytes + (at - range.begin), count);
    at += count;
  }
  attempt.begin += std::chrono::steady_clock::now() - begin;
}

// When there is enough of it, or at the end.
void RangeReader::tell_later(Attempt& attempt, ByteRange range, const char* bytes) const {
  if (!tap_) return;
  if (attempt.untold.end != range.begin || attempt.untold_bytes + attempt.untold.size() != bytes) tell_rest(attempt);
  if (attempt.untold.empty()) {
    attempt.untold = range;
    attempt.untold_bytes = bytes;
  } else {
    attempt.untold.end = range.end;
  }
  if (attempt.untold.size() >= tap_->piece()) tell_rest(attempt);
}

void RangeReader::tell_rest(Attempt& attempt) const {
  const ByteRange range = std::exchange(attempt.untold, ByteRange{});
  tell(attempt, range, attempt.untold_bytes);
}

// Not what a tap is to see, which past the caches would find it in memory.
bool RangeReader::may_copy(Attempt& attempt) {
  if (!file_ || tap_ || storage_ == Storage::user_space) return false;
  if (!attempt.copy) attempt.copy.emplace(*file_, attempt.range, mappings_);
  return true;
}

bool RangeReader::copy_pieces(Attempt& attempt, ByteRange first, uint64_t stride, uint64_t count, char* destination) {
  if (!attempt.cached || !may_copy(attempt)) return false;
  if (!attempt.copy->read_pieces(first, stride, count, destination)) return false;
  counts_.buffered_bytes += first.size() * count;
  return true;
}

void RangeReader::end(Attempt& attempt) {
  record(attempt);
  tell_rest(attempt);
}

void RangeReader::record(const Attempt& attempt) {
  if (!attempt.timed && !attempt.into_cache) return;
  const std::chrono::nanoseconds elapsed = std::chrono::steady_clock::now() - attempt.begin;
  if (attempt.into_cache) filler_.prices().record(*attempt.into_cache, elapsed, attempt.range.size());
  if (attempt.timed) rates_->record(attempt.direct, attempt.range.size(), static_cast<uint64_t>(elapsed.count()));
}

}  // namespace weightload
