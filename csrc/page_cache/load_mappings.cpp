#include "page_cache/load_mappings.h"

#include <sys/mman.h>

#include <mutex>

#include "base/pages.h"

namespace weightload {

LoadMappings::Mapping::~Mapping() {
  if (begin_) ::munmap(begin_, static_cast<size_t>(pages_.size()));
}

std::optional<LoadMappings::Mapping> LoadMappings::map(const File& file, ByteRange range) {
  std::shared_lock<std::shared_mutex> allowed(mapping_);
  if (given_up_) return std::nullopt;
  const ByteRange pages = pages_around(range);
  void* const begin = ::mmap(nullptr, static_cast<size_t>(pages.size()), PROT_READ, MAP_PRIVATE | MAP_NORESERVE,
                             file.descriptor().get(), static_cast<off_t>(pages.begin));
  if (begin == MAP_FAILED) return std::nullopt;
  return Mapping(std::move(allowed), pages, begin);
}

void LoadMappings::give_up() {
  given_up_ = true;  // first: threads that go on mapping would keep the lock from whoever waits for all of them
  const std::unique_lock<std::shared_mutex> none_is_left(mapping_);
}

}  // namespace weightload
