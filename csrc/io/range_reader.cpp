#include "io/range_reader.h"

#include <algorithm>

#include "io/page_in.h"
#include "io/residency.h"

namespace weightload {
namespace {

// Residency is asked of three samples: asking of every page costs 34 ns a page, a tenth of reading it.
constexpr uint64_t kSample = 64 << 10;

// Whether most of the range is in the page cache. Unknown counts as cached: who may not know what is there had better
// not go past it.
bool is_cached(const File& file, ByteRange range) {
  if (range.size() <= 3 * kSample) {
    const auto cached = cached_bytes(file, range);
    return !cached || *cached * 2 >= range.size();
  }
  int samples = 0;
  for (uint64_t begin : {range.begin, range.begin + (range.size() - kSample) / 2, range.end - kSample}) {
    const auto cached = cached_bytes(file, {begin, begin + kSample});
    if (!cached || *cached * 2 >= kSample) ++samples;
  }
  return samples >= 2;
}

}  // namespace

RangeReader::RangeReader(const ByteSource& source, const File* file, ReadMode mode, ReadCounts& counts)
    : source_(source), file_(file), mode_(mode), direct_works_(false), counts_(counts) {
  if (!file || mode == ReadMode::buffered) return;
  direct_ = DirectFile::open(*file, mode == ReadMode::direct);
  direct_works_ = direct_ != nullptr;
}

bool RangeReader::prefers_direct(ByteRange range) const {
  if (!direct_works_.load(std::memory_order_relaxed)) return false;
  return mode_ == ReadMode::direct || !is_cached(*file_, range);
}

bool RangeReader::direct(ByteRange range, char* destination) {
  if (!direct_->read(range, destination)) {
    direct_works_ = false;
    return false;
  }
  counts_.direct_bytes += range.size();
  return true;
}

void RangeReader::buffered(ByteRange range, char* destination) {
  source_.read(range.begin, destination, static_cast<size_t>(range.size()));
  counts_.buffered_bytes += range.size();
}

void RangeReader::prepare(ByteRange range) const {
  if (mapping_) fill_page_cache(*file_, mapping_, range);
}

}  // namespace weightload
