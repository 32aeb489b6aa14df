#include "io/page_in.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include "io/fault_hook.h"

namespace weightload {
namespace {

constexpr size_t kScratchBytes = 256 << 10;  // fits the second-level cache, so that the copy stays cheap

// Reads the range and drops the bytes: leaves its pages in the page cache, and finds the error that
// populate() only hinted at.
void read_and_drop(const ByteSource& file, ByteRange range) {
  const std::unique_ptr<char[]> scratch(new char[kScratchBytes]);
  for (uint64_t position = range.begin; position < range.end;) {
    const size_t count = static_cast<size_t>(std::min<uint64_t>(kScratchBytes, range.end - position));
    file.read(position, scratch.get(), count);
    position += count;
  }
}

}  // namespace

void page_in(const ByteSource& file, char* mapping, ByteRange range) {
  static const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const uint64_t begin = round_down(range.begin, page);
  const uint64_t end = round_up(range.end, page);
  int result;
  do {
    result = fault_hook::populate(mapping + begin, static_cast<size_t>(end - begin));
  } while (result != 0 && errno == EINTR);
  // EINVAL: a kernel before 5.14. EFAULT, EIO, ENOMEM, EHWPOISON: something is wrong, pread says what and
  // where.
  if (result != 0) read_and_drop(file, range);
}

}  // namespace weightload
