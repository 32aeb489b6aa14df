#include "io/page_in.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/pages.h"
#include "io/residency.h"

namespace weightload {
namespace {

constexpr size_t kScratchBytes = 256 << 10;  // fits the second-level cache, so that the copy stays cheap

// Reads the range and drops the bytes.
void read_and_drop(const File& file, ByteRange range) {
  const std::unique_ptr<char[]> scratch(new char[kScratchBytes]);
  for (uint64_t position = range.begin; position < range.end;) {
    const size_t count = static_cast<size_t>(std::min<uint64_t>(kScratchBytes, range.end - position));
    file.read(position, scratch.get(), count);
    position += count;
  }
}

}  // namespace

// Note [Populate, then read]
// MADV_POPULATE_READ on a mapping that asks for huge pages reads 2 MiB at a time into 2 MiB pages, with the
// next 2 MiB on the way, whatever the device's readahead setting (often 128 KiB): the fastest way we found to
// fill the page cache, and the one that leaves it cheapest to map, now and for the next process.
//
// But it touches nothing. On a virtual machine whose host backs memory on first touch, each page of a fresh
// page cache then costs the consumer, one thread, a fault in the host. Copying the pages once through a small
// buffer makes the reading threads take those faults, in parallel, at the price of memory bandwidth that a
// disk leaves free. It also proves that every byte can be read, with its errno if not. Figures:
// csrc/README.md, "Cold pages".
//
// Where the kernel does not say what is cached, as of other users' files, that is seen by the way: pages that were
// there cost no major fault, and are not read again.
void page_in(const File& file, char* mapping, ByteRange range, const PageTables& tables) {
  const std::optional<uint64_t> cached = cached_bytes(file, range, mapping);
  const ByteRange pages = pages_around(range);
  char* const begin = mapping + pages.begin;
  char* const end = mapping + pages.end;
  bool was_read = cached != range.size();
  const int error_number = !cached    ? tables.map_unknown(begin, end, was_read)
                           : was_read ? PageTables::populate(begin, end)
                                      : tables.map_cached(begin, end);
  if (!was_read && error_number == 0) return;

  // EFAULT: pages beyond the end of the file, or an I/O error. The read knows which, and where. Where populating is
  // refused (kernels before 5.14, sandboxes) it shows that the bytes can be read; the consumer takes the page faults.
  read_and_drop(file, range);
  if (error_number != 0 && !PageTables::is_refusal(error_number))
    throw Error(ErrorKind::read, "cannot map pages of the file", {file.path(), {}, range.begin, error_number});
}

void fill_page_cache(const File& file, char* mapping, ByteRange range) {
  const std::optional<uint64_t> cached = cached_bytes(file, range, mapping);
  if (cached == range.size()) return;
  const ByteRange pages = pages_around(range);
  char* const begin = mapping + pages.begin;
  char* const end = mapping + pages.end;
  if (cached || PageTables::has_to_read(begin, end)) PageTables::populate(begin, end);
  // Nobody will use these page table entries. Those at the ends may be of pages that also hold bytes of a mapped
  // tensor: if its owner has written to it, that page is a copy, and would be lost.
  const ByteRange unused = pages_within(range);
  if (!unused.empty()) ::madvise(mapping + unused.begin, unused.size(), MADV_DONTNEED);
}

}  // namespace weightload
