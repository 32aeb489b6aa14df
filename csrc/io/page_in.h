#pragma once
#include <cstddef>

#include "base/byte_range.h"
#include "io/byte_source.h"

namespace weightload {

// Brings `range` of a file into the page cache and into the page table of a mapping of that file, so that
// whoever touches it next takes no page fault. `mapping` is the address of the file's byte 0 there.
//
// Throws Error{read} with offset and errno when the bytes cannot be read or are not there any more. A thread
// never touches the mapping itself: a file that shrank would end the process with SIGBUS, a system call says
// EFAULT.
void page_in(const ByteSource& file, char* mapping, ByteRange range);

}  // namespace weightload
