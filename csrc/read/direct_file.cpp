#include "read/direct_file.h"

#include <fcntl.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/pages.h"
#include "base/uninterrupted.h"
#include "file/fault_hook.h"
#include "file/file_system.h"

namespace weightload {
namespace {

constexpr uint64_t kBlock = kDirectAlignment;

}  // namespace

std::unique_ptr<const DirectFile> DirectFile::open(const File& file, bool anywhere) {
  if (!anywhere && storage_of(file) != Storage::disk) return nullptr;
  std::optional<open_files::Extra> room = open_files::Extra::take();
  if (!room) return nullptr;
  // By descriptor, not by name: the name may stand for another file by now.
  const open_files::Lease lease = file.descriptor();
  const std::string link = "/proc/self/fd/" + std::to_string(lease.get());
  const int number = uninterrupted([&] { return ::open(link.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC | O_NOCTTY); });
  if (number < 0) return nullptr;
  return std::unique_ptr<const DirectFile>(new DirectFile(file, UniqueFd(number), std::move(*room)));
}

// Adds what was read to `got`. `wanted_from` serves the message.
DirectFile::Outcome DirectFile::read_blocks(ByteRange blocks, char* destination, uint64_t wanted_from,
                                            uint64_t& got) const {
  for (uint64_t position = blocks.begin; position < blocks.end;) {
    const auto left = static_cast<size_t>(blocks.end - position);
    const ssize_t now =
        fault_hook::pread(fd_.get(), destination + (position - blocks.begin), left, static_cast<off_t>(position));
    if (now < 0) {
      const int error = errno;
      if (error == EINTR) continue;
      // EINVAL of a file system that cannot, EFAULT of memory that the kernel can write to but not hand to the disk,
      // anything of a sandbox or a driver in user space. What is lost is so in the page cache, too, which says it then.
      if (error != EIO) return Outcome::refused;
      throw Error(ErrorKind::read, "cannot read " + std::to_string(left) + " bytes",
                  {file_.path(), {}, std::max(position, wanted_from), error});
    }
    position += static_cast<uint64_t>(now);
    got += static_cast<uint64_t>(now);
    // A short read that is not a whole number of blocks is the end of the file, or a disk that was interrupted: what
    // is left of the range cannot be read directly from there.
    if (now == 0 || static_cast<uint64_t>(now) % kBlock != 0) return Outcome::ended;
  }
  return Outcome::all;
}

std::optional<uint64_t> DirectFile::read(ByteRange range, char* destination, Pace& pace, const Look& look) const {
  const uint64_t begin = round_down(range.begin, kBlock);
  const uint64_t end = std::min(round_up(range.end, kBlock), round_down(file_.size(), kBlock));
  char* const base = destination - (range.begin - begin);
  uint64_t got = 0;
  auto outcome = Outcome::all;
  pace.in_pieces({begin, std::max(begin, end)}, look, [&](ByteRange piece) {
    outcome = read_blocks(piece, base + (piece.begin - begin), range.begin, got);
    return outcome == Outcome::all;
  });
  if (outcome == Outcome::refused && got == 0) return std::nullopt;
  // The last, partial block, and whatever a short read or a refusal left.
  const uint64_t from = std::max(begin + got, range.begin);
  if (from >= range.end) return got;
  read_in_pieces(file_, {from, range.end}, base + (from - begin), pace, look);
  return got + (range.end - from);
}

bool DirectFile::suits_private_memory() {
  static const bool suits = [] {
    struct utsname kernel{};
    unsigned major = 0, minor = 0;
    if (::uname(&kernel) != 0 || std::sscanf(kernel.release, "%u.%u", &major, &minor) != 2) return false;
    return std::make_pair(major, minor) >= (page_bytes() == 4096 ? std::make_pair(5u, 18u) : std::make_pair(6u, 5u));
  }();
  return suits;
}

bool DirectFile::fits(ByteRange range, const char* destination) {
  return (reinterpret_cast<uintptr_t>(destination) - range.begin) % kBlock == 0 &&
         round_up(range.begin, kBlock) < round_down(range.end, kBlock);
}

std::optional<uint64_t> DirectFile::read_within(ByteRange range, char* destination, Pace& pace,
                                                const Look& look) const {
  const ByteRange whole{round_up(range.begin, kBlock), round_down(range.end, kBlock)};
  std::optional<uint64_t> got = read(whole, destination + (whole.begin - range.begin), pace, look);
  if (!got) return got;
  // The blocks at the ends hold bytes of others: by way of a block that is nobody's.
  alignas(kBlock) char block[kBlock];
  for (const ByteRange end : {ByteRange{range.begin, whole.begin}, ByteRange{whole.end, range.end}}) {
    if (end.empty()) continue;
    char* const part = block + end.begin % kBlock;
    const std::optional<uint64_t> block_got = read(end, part, pace, look);
    if (!block_got) file_.read(end.begin, part, static_cast<size_t>(end.size()));
    *got += block_got.value_or(end.size());
    std::memcpy(destination + (end.begin - range.begin), part, static_cast<size_t>(end.size()));
  }
  return got;
}

}  // namespace weightload
