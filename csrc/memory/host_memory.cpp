#include "memory/host_memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdlib>

#include "base/byte_range.h"
#include "base/error.h"
#include "memory/spare_memory.h"

namespace weightload {
namespace {

constexpr size_t kCacheLine = 64;

class MappedFile final : public HostMemory {
 public:
  MappedFile(void* address, size_t size) {
    data_ = static_cast<char*>(address);
    size_ = size;
  }
  ~MappedFile() override {
    if (size_ > 0) ::munmap(data_, size_);
  }
};

class SmallBlock final : public HostMemory {
 public:
  SmallBlock(void* address, size_t size) {
    data_ = static_cast<char*>(address);
    size_ = size;
  }
  ~SmallBlock() override { std::free(data_); }
};

class HugeBlock final : public HostMemory {
 public:
  HugeBlock(const HugeRegion& region, size_t size) : region_(region) {
    data_ = region.start;
    size_ = size;
  }
  ~HugeBlock() override { spare_memory::give(region_); }

 private:
  HugeRegion region_;
};

}  // namespace

HostMemoryRef map_file(int fd, uint64_t size, const std::string& path, Access access) {
  if (size == 0) return HostMemoryRef::adopt(new MappedFile(nullptr, 0));
  const int protection = access == Access::write ? PROT_READ | PROT_WRITE : PROT_READ;
  void* address = ::mmap(nullptr, size, protection, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
  if (address == MAP_FAILED) {
    const int error = errno;
    if (error == ENOMEM) throw Error(ErrorKind::memory, "cannot map the file", {path, {}, {}, error});
    throw Error(ErrorKind::read, "cannot map the file; backend=\"pread\" reads it into private memory instead",
                {path, {}, {}, error});
  }
  // See Note [Populate, then read] in page_cache/page_in.cpp. Advice only.
  ::madvise(address, size, MADV_HUGEPAGE);
  return HostMemoryRef::adopt(new MappedFile(address, size));
}

HostMemoryRef allocate_block(uint64_t size) {
  if (size >= kHugePage) return HostMemoryRef::adopt(new HugeBlock(spare_memory::take(size), size));
  void* address = std::aligned_alloc(kCacheLine, round_up(size + 1, kCacheLine));
  if (!address) {
    throw Error(ErrorKind::memory, "cannot allocate " + std::to_string(size) + " bytes of host memory",
                {{}, {}, {}, ENOMEM});
  }
  return HostMemoryRef::adopt(new SmallBlock(address, size));
}

}  // namespace weightload
