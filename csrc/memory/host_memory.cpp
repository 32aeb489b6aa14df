#include "memory/host_memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdlib>

#include "base/byte_range.h"
#include "base/error.h"

namespace weightload {
namespace {

constexpr size_t kHugePage = 2u << 20;  // of x86-64 and of arm64 with 4 KiB pages; elsewhere merely an alignment
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
  HugeBlock(void* address, size_t size, void* mapping, size_t mapped) : mapping_(mapping), mapped_(mapped) {
    data_ = static_cast<char*>(address);
    size_ = size;
  }
  ~HugeBlock() override { ::munmap(mapping_, mapped_); }

 private:
  void* mapping_;
  size_t mapped_;
};

[[noreturn]] void out_of_memory(uint64_t size, int error_number) {
  throw Error(ErrorKind::memory, "cannot allocate " + std::to_string(size) + " bytes of host memory",
              {{}, {}, {}, error_number});
}

HostMemoryRef allocate_huge(uint64_t size) {
  // Over-allocate by one huge page to find an aligned start; the slack is address space, never touched.
  const size_t used = round_up(size, kHugePage);
  const size_t mapped = used + kHugePage;
  void* mapping = ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) out_of_memory(size, errno);
  void* start = reinterpret_cast<void*>(round_up(reinterpret_cast<uintptr_t>(mapping), kHugePage));
  // Advice only: where huge pages are switched off the block works as before, slower to fill.
  ::madvise(start, used, MADV_HUGEPAGE);
  return HostMemoryRef::adopt(new HugeBlock(start, size, mapping, mapped));
}

}  // namespace

HostMemoryRef map_file(int fd, uint64_t size, const std::string& path) {
  if (size == 0) return HostMemoryRef::adopt(new MappedFile(nullptr, 0));
  void* address = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
  if (address == MAP_FAILED) {
    const ErrorKind kind = errno == ENOMEM ? ErrorKind::memory : ErrorKind::open;
    throw Error(kind, "cannot map the file", {path, {}, {}, errno});
  }
  // See Note [Populate, then read] in io/page_in.cpp. Advice only.
  ::madvise(address, size, MADV_HUGEPAGE);
  return HostMemoryRef::adopt(new MappedFile(address, size));
}

HostMemoryRef allocate_block(uint64_t size) {
  if (size >= kHugePage) return allocate_huge(size);
  void* address = std::aligned_alloc(kCacheLine, round_up(size + 1, kCacheLine));
  if (!address) out_of_memory(size, ENOMEM);
  return HostMemoryRef::adopt(new SmallBlock(address, size));
}

}  // namespace weightload
