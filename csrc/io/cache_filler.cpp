#include "io/cache_filler.h"

#include <sys/mman.h>

#include <mutex>

#include "base/pages.h"
#include "io/page_tables.h"

namespace weightload {

bool CacheFiller::fill(const File& file, ByteRange range, bool known) {
  const std::shared_lock<std::shared_mutex> lock(filling_);
  if (given_up_) return false;
  const ByteRange pages = pages_around(range);
  const auto length = static_cast<size_t>(pages.size());
  void* const mapping = ::mmap(nullptr, length, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, file.descriptor().get(),
                               static_cast<off_t>(pages.begin));
  if (mapping == MAP_FAILED) return false;
  char* const begin = static_cast<char*>(mapping);
  ::madvise(begin, length, MADV_HUGEPAGE);
  const bool wanted = known || PageTables::has_to_read(begin, begin + length);
  const int error_number = wanted ? PageTables::populate(begin, begin + length) : 0;
  ::munmap(begin, length);
  return error_number == 0;
}

void CacheFiller::give_up() {
  const std::unique_lock<std::shared_mutex> lock(filling_);
  given_up_ = true;
}

}  // namespace weightload
