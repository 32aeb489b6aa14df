#include "io/direct_file.h"

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
#include "io/fault_hook.h"
#include "io/file_system.h"

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
  int number;
  do {
    number = ::open(link.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC | O_NOCTTY);
  } while (number < 0 && errno == EINTR);
  if (number < 0) return nullptr;
  return std::unique_ptr<const DirectFile>(new DirectFile(file, UniqueFd(number), std::move(*room)));
}

bool DirectFile::read(ByteRange range, char* destination) const {
  const uint64_t begin = round_down(range.begin, kBlock);
  const uint64_t end = std::min(round_up(range.end, kBlock), round_down(file_.size(), kBlock));
  char* const base = destination - (range.begin - begin);
  uint64_t position = begin;
  while (position < end) {
    const ssize_t got = fault_hook::pread(fd_.get(), base + (position - begin), static_cast<size_t>(end - position),
                                          static_cast<off_t>(position));
    if (got < 0) {
      if (errno == EINTR) continue;
      // EINVAL of a file system that cannot, EFAULT of memory that the kernel can write to but not hand to the disk,
      // anything of a sandbox or a driver in user space. What is lost is so in the page cache, too, which says it then.
      const bool refused = errno != EIO;
      if (refused && position == begin) return false;
      if (refused) break;
      throw Error(ErrorKind::read, "cannot read " + std::to_string(end - position) + " bytes",
                  {file_.path(), {}, std::max(position, range.begin), errno});
    }
    // A short read that is not a whole number of blocks is the end of the file, or a disk that was interrupted: what
    // is left of the range cannot be read directly from there.
    position += static_cast<uint64_t>(got);
    if (got == 0 || static_cast<uint64_t>(got) % kBlock != 0) break;
  }
  // The last, partial block, and whatever a short read or a refusal left.
  const uint64_t from = std::max(position, range.begin);
  if (from < range.end) file_.read(from, base + (from - begin), static_cast<size_t>(range.end - from));
  return true;
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

bool DirectFile::read_within(ByteRange range, char* destination) const {
  const ByteRange whole{round_up(range.begin, kBlock), round_down(range.end, kBlock)};
  if (!read(whole, destination + (whole.begin - range.begin))) return false;
  // The blocks at the ends hold bytes of others: by way of a block that is nobody's.
  alignas(kBlock) char block[kBlock];
  for (const ByteRange end : {ByteRange{range.begin, whole.begin}, ByteRange{whole.end, range.end}}) {
    if (end.empty()) continue;
    char* const part = block + end.begin % kBlock;
    if (!read(end, part)) file_.read(end.begin, part, static_cast<size_t>(end.size()));
    std::memcpy(destination + (end.begin - range.begin), part, static_cast<size_t>(end.size()));
  }
  return true;
}

}  // namespace weightload
