#pragma once
#include <cstdint>
#include <optional>

#include "base/byte_range.h"
#include "file/file.h"

namespace weightload {

// Bytes of `range` whose pages are in the page cache, or nothing where the kernel does not say. One system
// call with cachestat (Linux 6.5); before that, and on overlayfs, mincore, about 20 ns a page, on `mapping` (the
// address of the file's byte 0 in one) or else on a mapping for the purpose. Both answer only to those who own the file
// or may write it (cachestat since 6.15), so that nobody can watch what others read.
std::optional<uint64_t> cached_bytes(const File& file, ByteRange range, char* mapping = nullptr);

// Whether the range is in the page cache, also of files of other users, by some pages of it (Note [Files of others]).
// Nothing where that cannot be told either. A wrong answer must cost no more than time: whoever hands out pages that
// nobody has asked for needs cached_bytes().
std::optional<bool> seems_cached(const File& file, ByteRange range, char* mapping = nullptr);

// The same with the call chosen, for tests.
std::optional<uint64_t> cached_bytes_by_cachestat(const File& file, ByteRange range);
std::optional<uint64_t> cached_bytes_by_mincore(const File& file, ByteRange range, char* mapping = nullptr);
std::optional<bool> seems_cached_by_reads(const File& file, ByteRange range);
std::optional<bool> seems_cached_by_faults(const File& file, ByteRange range);

// Whether what is read of the file goes past the page cache, as a file system in user space may have it (FUSE's direct
// I/O). A mapping of such a file reads everything anew, whenever it is made, and takes short answers, which are allowed
// there, for the file's end: zeros, and a smaller file. To be asked after the file's first bytes have been read.
bool bypasses_page_cache(const File& file);

}  // namespace weightload
