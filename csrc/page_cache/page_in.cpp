#include "page_cache/page_in.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/pages.h"
#include "page_cache/cached_runs.h"
#include "page_cache/page_tables.h"
#include "page_cache/residency.h"

namespace weightload {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kScratchBytes = 256 << 10;  // fits the second-level cache, so that the copy stays cheap

// What a page of a mapping that asks for huge pages is read with: twice as much, as one.
constexpr uint64_t kLeastToPopulate = 4 << 20;

// A host finds memory in pieces of its own: of so many bytes one page is touched to see whether it has to, and what
// that takes at most if not. Reading a page that is there takes half a microsecond, a fault in the host eight.
constexpr uint64_t kStretch = 128 << 10;
constexpr std::chrono::microseconds kBackedPage{4};

// What huge pages cost where the host had memory for all of them: the storage's time says nothing of pages.
constexpr PagePrices::Cost kNothing{0};

// Reads the range and drops the bytes.
void read_and_drop(const File& file, ByteRange range) {
  if (range.empty()) return;
  const std::unique_ptr<char[]> scratch(new char[std::min<uint64_t>(kScratchBytes, range.size())]);
  for (uint64_t position = range.begin; position < range.end;) {
    const size_t count = static_cast<size_t>(std::min<uint64_t>(kScratchBytes, range.end - position));
    file.read(position, scratch.get(), count);
    position += count;
  }
}

// Of a range that is in the page cache: touches the pages that the host has yet to find memory for. Whether there were
// any.
bool back_pages(const File& file, ByteRange range) {
  bool any = false;
  for (uint64_t begin = range.begin; begin < range.end;) {
    const uint64_t end = std::min(range.end, begin + kStretch);
    const ByteRange sample{begin, std::min(end, begin + page_bytes())};
    const auto start = Clock::now();
    read_and_drop(file, sample);
    if (Clock::now() - start > kBackedPage) {
      any = true;
      read_and_drop(file, {sample.end, end});
    }
    begin = end;
  }
  return any;
}

[[noreturn]] void fail_mapping(const File& file, uint64_t offset, int error_number) {
  throw Error(ErrorKind::read, "cannot map pages of the file", {file.path(), {}, offset, error_number});
}

}  // namespace

// Note [Populate, then read]
// MADV_POPULATE_READ on a mapping that asks for huge pages reads 2 MiB at a time into 2 MiB pages, with the
// next 2 MiB on the way, whatever the device's readahead setting (often 128 KiB): the fastest way we found to
// fill the page cache, and the one that leaves it cheapest to map, now and for the next process.
//
// But it touches nothing. On a virtual machine whose host backs memory on first touch, each page of a fresh
// page cache then costs the consumer, one thread, a fault in the host. Copying the pages once through a small
// buffer makes the reading threads take those faults, in parallel. Where the host has memory for them already it would
// only cost: of every stretch one page is read, and the rest where that has waited for the host. What the kernel has
// read ahead of a load is as fresh, and is looked at in the same way. Figures: csrc/notes/page_cache.md, "Cold
// pages".
//
// On storage that takes long for 2 MiB that cannot be: nothing ends a call that has asked for them. There the pages are
// read in small pieces, into the page cache only.
//
// Where huge pages of the page cache have turned out to cost more (Note [Prices of pages]) the bytes are read as they
// are by anyone, into the pages that the kernel's readahead takes.
bool page_in_from_storage(const File& file, char* mapping, ByteRange range, Pace& pace, PagePrices& prices,
                          const Look& look) {
  const bool may_populate = pace.allows(kLeastToPopulate);
  const Pages pages = may_populate ? prices.choose(range.size()) : Pages::single;
  const auto begin = Clock::now();
  bool populated = true;
  bool backed = true;
  const auto from_cache = [&](ByteRange run) {
    pace.in_cached_pieces(run, look, [&](ByteRange piece) { read_and_drop(file, piece); });
  };
  const auto read = [&](ByteRange piece) {
    int error_number = 0;
    if (pages == Pages::huge && pace.allows(kLeastToPopulate)) {
      const ByteRange around = pages_around(piece);
      error_number = PageTables::populate(mapping + around.begin, mapping + around.end);
      if (error_number == 0) {
        if (back_pages(file, piece)) backed = false;
        return;
      }
    } else {
      populated = false;
      file.read_on(pace.allows(Pace::kReadOn));
    }
    // EFAULT: pages beyond the end of the file, or an I/O error. The read knows which, and where.
    read_and_drop(file, piece);
    if (error_number != 0 && !PageTables::is_refusal(error_number)) fail_mapping(file, piece.begin, error_number);
  };
  const auto from_storage = [&](ByteRange run) { pace.in_pieces(run, look, read); };
  if (may_populate) {
    from_storage(range);
    prices.record(pages, populated && backed ? kNothing : Clock::now() - begin, range.size());
  } else {
    by_residency(file, range, from_cache, from_storage);
    populated = false;
  }
  return populated;
}

// Where the kernel does not say what is cached, as of other users' files. That is seen by the way: pages that were
// there cost no major fault, and are not read again.
static void page_in_unknown(const File& file, char* mapping, ByteRange range, const PageTables& tables, Pace& pace,
                            const Look& look) {
  pace.in_cached_pieces(range, look, [&](ByteRange piece) {
    const ByteRange pages = pages_around(piece);
    bool was_read = false;
    const int error_number = tables.map_unknown(mapping + pages.begin, mapping + pages.end, was_read);
    if (!was_read && error_number == 0) return;
    read_and_drop(file, piece);
    if (error_number != 0 && !PageTables::is_refusal(error_number)) fail_mapping(file, piece.begin, error_number);
  });
}

void page_in(const File& file, char* mapping, ByteRange range, const PageTables& tables, Pace& pace, PagePrices& prices,
             const Look& look) {
  const ByteRange pages = pages_around(range);
  const auto map_cached = [&] { return tables.map_cached(mapping + pages.begin, mapping + pages.end); };
  const std::optional<uint64_t> cached = cached_bytes(file, range, mapping);
  if (!cached) return page_in_unknown(file, mapping, range, tables, pace, look);
  if (*cached == range.size() && map_cached() == 0) {
    // A load that has met storage finds what the kernel has read ahead for it: as fresh as what it asked for.
    if (pace.allows(kLeastToPopulate)) back_pages(file, range);
    return;
  }
  if (page_in_from_storage(file, mapping, range, pace, prices, look)) return;
  const int error_number = map_cached();
  if (error_number != 0 && !PageTables::is_refusal(error_number)) fail_mapping(file, range.begin, error_number);
}

}  // namespace weightload
