#pragma once
#include <cstdint>

#include "io/file.h"

namespace weightload {

// What reading past the page cache would mean for a file.
enum class Storage : uint8_t {
  disk,        // a local disk: the page cache is a copy that can be saved
  memory,      // tmpfs and the like: the page cache is all there is
  shared,      // network, overlay: the cache is what processes share, and direct reads may be anything
  user_space,  // FUSE: likewise, and the page cache may hold nothing at all
};

Storage storage_of(const File& file);

// Whether what is read of the file goes past the page cache, as a file system in user space may have it (FUSE's direct
// I/O). A mapping of such a file reads everything anew, whenever it is made, and takes short answers, which are allowed
// there, for the file's end: zeros, and a smaller file. To be asked after the file's first bytes have been read.
bool bypasses_page_cache(const File& file);

}  // namespace weightload
