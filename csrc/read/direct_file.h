#pragma once
#include <cstdint>
#include <memory>
#include <optional>

#include "base/byte_range.h"
#include "base/unique_fd.h"
#include "file/file.h"

namespace weightload {

// A second descriptor of an open file, whose reads bypass the page cache (O_DIRECT): the disk writes into the reader's
// memory by itself, which saves a copy and leaves the page cache to others.
class DirectFile {
 public:
  // Null where the file system cannot, or should not: tmpfs is memory already, and on a network or in user space the
  // cache is what ranks and processes share. `anywhere` tries those too. Null, too, where descriptors are scarce: files
  // must be had, this can be done without.
  static std::unique_ptr<const DirectFile> open(const File& file, bool anywhere);

  // Reads `range`, whose ends are widened to whole blocks, so that its first byte lands at `destination`: the two agree
  // modulo kDirectAlignment, and destination has a block's room before and after the range. The file's last, partial
  // block is read through the page cache, since not every file system reads it directly.
  //
  // In pieces, with a look before each. Returns how many bytes were read, the rest of blocks among them; nothing when
  // it is refused after all (any error but EIO): nothing has been read. Otherwise as File::read.
  std::optional<uint64_t> read(ByteRange range, char* destination, Pace& pace, const Look& look) const;

  // The same, and writes nothing but the range; for those that fits().
  std::optional<uint64_t> read_within(ByteRange range, char* destination, Pace& pace, const Look& look) const;

  // Whether the disk may write into memory that the process may fork, or has lent to the kernel (MADV_FREE), meanwhile.
  // Kernels before 5.18 could lose what it wrote; with pages larger than 4 KiB, which two reads may share, before 6.5.
  static bool suits_private_memory();

  // Whether the two agree modulo kDirectAlignment and the range has a whole block.
  static bool fits(ByteRange range, const char* destination);

 private:
  DirectFile(const File& file, UniqueFd fd, open_files::Extra room)
      : file_(file), room_(std::move(room)), fd_(std::move(fd)) {}

  enum class Outcome : uint8_t { all, ended, refused };
  Outcome read_blocks(ByteRange blocks, char* destination, uint64_t wanted_from, uint64_t& got) const;

  const File& file_;
  open_files::Extra room_;
  UniqueFd fd_;
};

}  // namespace weightload
