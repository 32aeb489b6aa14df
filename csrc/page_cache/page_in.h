#pragma once
#include "base/byte_range.h"
#include "base/look.h"
#include "file/file.h"
#include "memory/page_prices.h"
#include "page_cache/page_tables.h"
#include "threads/pace.h"

namespace weightload {

// Brings `range` of a file into the page cache, and into the page table of a mapping of that file, so that whoever
// touches it next waits for nothing. `mapping` is the address of the file's byte 0 there.
//
// Throws Error{read} with offset and errno when the bytes cannot be read or are not there any more. A thread
// never touches the mapping itself: a file that shrank would end the process with SIGBUS, a system call
// returns an error. What comes from storage is read in pieces, into the pages that are cheaper by `prices`.
void page_in(const File& file, char* mapping, ByteRange range, const PageTables& tables, Pace& pace, PagePrices& prices,
             const Look& look);

// The same for bytes that are not all in the page cache. False if they are not all in the page table.
bool page_in_from_storage(const File& file, char* mapping, ByteRange range, Pace& pace, PagePrices& prices,
                          const Look& look);

}  // namespace weightload
