#pragma once
#include "base/byte_range.h"
#include "io/file.h"
#include "io/page_tables.h"

namespace weightload {

// Brings `range` of a file into the page cache, and into the page table of a mapping of that file, so that whoever
// touches it next waits for nothing. `mapping` is the address of the file's byte 0 there.
//
// Throws Error{read} with offset and errno when the bytes cannot be read or are not there any more. A thread
// never touches the mapping itself: a file that shrank would end the process with SIGBUS, a system call
// returns an error.
void page_in(const File& file, char* mapping, ByteRange range, const PageTables& tables);

// Brings `range` into the page cache only, for a pread that follows; `mapping` as above, of which nobody may use pages
// that hold nothing but bytes of the range. Best effort: what cannot be read is left to that pread to find.
void fill_page_cache(const File& file, char* mapping, ByteRange range);

}  // namespace weightload
