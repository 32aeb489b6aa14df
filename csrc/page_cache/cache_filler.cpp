#include "page_cache/cache_filler.h"

#include <sys/mman.h>

#include <optional>

#include "page_cache/page_tables.h"

namespace weightload {

bool CacheFiller::fill(const File& file, ByteRange range, bool known) {
  const std::optional<LoadMappings::Mapping> mapping = mappings_.map(file, range);
  if (!mapping) return false;
  ::madvise(mapping->begin(), static_cast<size_t>(mapping->end() - mapping->begin()), MADV_HUGEPAGE);
  const bool wanted = known || PageTables::has_to_read(mapping->begin(), mapping->end());
  return !wanted || PageTables::populate(mapping->begin(), mapping->end()) == 0;
}

}  // namespace weightload
