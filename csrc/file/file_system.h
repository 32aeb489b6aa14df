#pragma once
#include <cstdint>

#include "file/file.h"

namespace weightload {

// What reading past the page cache would mean for a file.
enum class Storage : uint8_t {
  disk,        // a local disk: the page cache is a copy that can be saved
  memory,      // tmpfs and the like: the page cache is all there is
  shared,      // network, overlay: the cache is what processes share, and direct reads may be anything
  user_space,  // FUSE: likewise, and the page cache may hold nothing at all
};

Storage storage_of(const File& file);

}  // namespace weightload
