#include "page_cache/mapped_copy.h"

#include <sys/mman.h>

#include <utility>

#include "base/pages.h"
#include "memory/bus_guard.h"
#include "memory/stream_copy.h"
#include "page_cache/page_tables.h"

namespace weightload {
namespace {

// Of smaller ones most lines are shared by two, and written twice.
constexpr uint64_t kLeastPiece = 512;

// Pages that nobody wants, between two pieces.
constexpr uint64_t kLeastGap = 8 << 10;

}  // namespace

bool MappedCopy::read_pieces(ByteRange first, uint64_t stride, uint64_t count, char* destination) {
  if (!kCanStream || failed_ || range_.size() < kLeastBytes || (count > 1 && first.size() < kLeastPiece)) return false;
  failed_ = true;
  if (!mapping_) {
    std::optional<LoadMappings::Mapping> made = mappings_.map(file_, range_);
    if (!made) return false;
    mapping_.emplace(std::move(*made));
  }
  const ByteRange pages = pages_around({first.begin, first.end + stride * (count - 1)});
  char* const begin = mapping_->at(pages.begin);
  char* const end = mapping_->at(pages.end);
  if (count == 1 || stride - first.size() < kLeastGap) {
    // Faster than the faults, and an error is one; a refusal is not.
    const int error_number = PageTables::populate(begin, end);
    if (error_number != 0 && !PageTables::is_refusal(error_number)) return false;
  } else if (!random_) {
    // What is not in the page cache after all is read by itself: nobody wants what is around it.
    ::madvise(mapping_->begin(), static_cast<size_t>(mapping_->end() - mapping_->begin()), MADV_RANDOM);
    random_ = true;
  }
  const BusGuard guard(mapping_->begin(), mapping_->end());
  if (!guard.is_armed()) return false;
  const auto size = static_cast<size_t>(first.size());
  for (uint64_t piece = 0; piece < count; ++piece)
    stream_copy_unfenced(destination + piece * size, mapping_->at(first.begin + piece * stride), size);
  stream_fence();
  failed_ = guard.hit();
  return !failed_;
}

}  // namespace weightload
