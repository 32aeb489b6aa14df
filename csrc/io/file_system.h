#pragma once
#include <cstdint>

#include "io/file.h"

namespace weightload {

// What reading past the page cache would mean for a file.
enum class Storage : uint8_t {
  disk,    // a local disk: the page cache is a copy that can be saved
  memory,  // tmpfs and the like: the page cache is all there is
  shared,  // network, user space, overlay: the cache is what processes share, and direct reads may be anything
};

Storage storage_of(const File& file);

}  // namespace weightload
