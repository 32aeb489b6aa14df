#include "memory/block_cache.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstring>

#include "base/error.h"
#include "check.h"

using namespace weightload;

TEST(blocks_of_every_size_are_writable_and_aligned) {
  for (uint64_t size :
       {0ull, 1ull, 63ull, 64ull, 4096ull, (2ull << 20) - 1, 2ull << 20, (2ull << 20) + 1, 9ull << 20}) {
    const HostMemoryRef block = allocate_block(size);
    CHECK(block->size() == size);
    CHECK(reinterpret_cast<uintptr_t>(block->data()) % 64 == 0);
    if (size >= 2ull << 20) CHECK(reinterpret_cast<uintptr_t>(block->data()) % (2ull << 20) == 0);
    std::memset(block->data(), 0xab, size);
  }
}

TEST(too_much_is_an_error_with_errno) {
  CHECK_THROWS(allocate_block(1ull << 62), Error,
               error.kind == ErrorKind::memory && error.context.error_number == ENOMEM);
}

TEST(references_keep_memory_alive) {
  HostMemoryRef copy;
  {
    const HostMemoryRef block = allocate_block(100);
    std::memset(block->data(), 7, 100);
    copy = block;
  }
  CHECK(copy->data()[99] == 7);
}

TEST(a_mapping_is_copy_on_write) {
  char name[] = "/tmp/weightload-test-XXXXXX";
  const int fd = ::mkstemp(name);
  CHECK(::write(fd, "abcdef", 6) == 6);
  const HostMemoryRef mapping = map_file(fd, 6, name);
  mapping->data()[0] = 'X';
  char back[6];
  CHECK(::pread(fd, back, 6, 0) == 6 && std::memcmp(back, "abcdef", 6) == 0);
  ::close(fd);
  ::unlink(name);
  CHECK(std::memcmp(mapping->data(), "Xbcdef", 6) == 0);
}

TEST(an_empty_file_can_be_mapped) { CHECK(map_file(-1, 0, "empty")->size() == 0); }

TEST(a_cache_gives_a_dropped_block_again_and_never_one_in_use) {
  const auto cache = std::make_shared<BlockCache>(64ull << 20);
  HostMemoryRef first = cache->allocate(4ull << 20);
  std::memset(first->data(), 1, first->size());
  HostMemoryRef second = cache->allocate(4ull << 20);
  CHECK(second->data() != first->data());
  char* const address = first->data();
  const HostMemoryRef shared = first;
  first = {};
  CHECK(cache->allocate(4ull << 20)->data() != address);  // `shared` still holds it
  CHECK(shared->data()[0] == 1);
}

TEST(a_cache_reuses_what_fits_and_nothing_wasteful) {
  const auto cache = std::make_shared<BlockCache>(64ull << 20);
  char* const address = cache->allocate(8ull << 20)->data();
  CHECK(cache->allocate(9ull << 20)->data() != address);
  CHECK(cache->allocate(2ull << 20)->size() == 2ull << 20);
  CHECK(cache->allocate(5ull << 20)->data() == address);
}

TEST(blocks_outlive_their_cache) {
  HostMemoryRef block;
  {
    const auto cache = std::make_shared<BlockCache>(64ull << 20);
    block = cache->allocate(4ull << 20);
    cache->allocate(4ull << 20);
    cache->close();
  }
  std::memset(block->data(), 3, block->size());
}

TEST(a_cache_keeps_no_more_than_it_may) {
  const auto cache = std::make_shared<BlockCache>(4ull << 20);
  HostMemoryRef a = cache->allocate(4ull << 20);
  HostMemoryRef b = cache->allocate(4ull << 20);
  char* const address = a->data();
  a = {};
  b = {};  // goes back to the kernel
  CHECK(cache->allocate(4ull << 20)->data() == address);
}
