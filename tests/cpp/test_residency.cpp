// What is in the page cache: asked, guessed by reads that do not wait, and seen by page faults.
#include "page_cache/residency.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/pages.h"
#include "check.h"
#include "checkpoint.h"
#include "memory/host_memory.h"
#include "page_cache/cache_filler.h"
#include "page_cache/page_in.h"
#include "page_cache/page_tables.h"

using namespace weightload;

namespace {

constexpr uint64_t kSize = 9 << 20;

struct Cached {
  Cached() : temporary(0, {kSize}), file(File::open(temporary.path)), range{100'000, file->size()} {
    CHECK(::fsync(file->descriptor().get()) == 0);  // dirty pages cannot be dropped
  }
  // False where the file system keeps its pages (tmpfs).
  bool evict() const {
    CHECK(::posix_fadvise(file->descriptor().get(), 0, 0, POSIX_FADV_DONTNEED) == 0);
    return cached_bytes(*file, range).value_or(1) == 0;
  }
  HostMemoryRef map() const { return map_file(file->descriptor().get(), file->size(), file->path()); }
  ByteRange pages() const { return pages_around(range); }

  TemporaryFile temporary;
  std::shared_ptr<const File> file;
  ByteRange range;
};

}  // namespace

using Asks = std::optional<bool> (*)(const File&, ByteRange);

TEST(a_few_pages_tell_what_is_cached) {
  const Cached cached;
  for (const Asks seems : {seems_cached_by_reads, seems_cached_by_faults}) {
    const auto warm = seems(*cached.file, cached.range);
    if (!warm) continue;  // this file system cannot, or this kernel
    CHECK(*warm);
    CHECK(seems(*cached.file, {5, 6}) == true);
    CHECK(seems(*cached.file, {5, 5}) == true);
    CHECK(seems(*cached.file, {kSize, kSize << 1}) == false);  // beyond the end
  }
}

// The page that was asked for is brought in: asking again must not find it, nor may its neighbours come with it.
TEST(asking_does_not_change_the_answer) {
  for (const Asks seems : {seems_cached_by_reads, seems_cached_by_faults}) {
    const Cached cached;
    if (!cached.evict()) return;
    constexpr int kTurns = 12;
    for (int turn = 0; turn < kTurns; ++turn) {
      CHECK(!seems(*cached.file, cached.range).value_or(false));
      ::usleep(10'000);  // what it may have begun to read comes meanwhile
    }
    if (seems == seems_cached_by_faults) CHECK(*cached_bytes(*cached.file, cached.range) <= 2 * kTurns * page_bytes());
  }
}

TEST(what_is_refused_is_not_asked_again) {
  const Cached cached;
  CHECK(cached.file->refusals() == 0);
  cached.file->refusals() = 1 | 2;
  CHECK(!cached_bytes(*cached.file, cached.range));
  CHECK(seems_cached(*cached.file, cached.range).value_or(true));
  cached.file->refusals() = 1 | 2 | 4;
  CHECK(seems_cached(*cached.file, cached.range).value_or(true));
  cached.file->refusals() = 1 | 2 | 4 | 16;
  CHECK(!seems_cached(*cached.file, cached.range));
}

TEST(pages_that_had_to_be_read_are_seen_by_their_faults) {
  const PageTables tables;
  const Cached cached;
  const bool on_disk = cached.evict();
  for (const bool cold : {true, false}) {
    const HostMemoryRef memory = cached.map();
    bool was_read = !cold;
    CHECK(tables.map_unknown(memory->data() + cached.pages().begin, memory->data() + cached.pages().end, was_read) ==
          0);
    if (on_disk && cold) CHECK(was_read);
    if (!cold) CHECK(!was_read);
    for (uint64_t at = cached.range.begin; at < cached.range.end; at += page_bytes())
      CHECK(static_cast<unsigned char>(memory->data()[at]) == byte_at(0, at));
  }
}

TEST(a_file_that_shrank_is_an_error_where_nothing_is_known_too) {
  const PageTables tables;
  for (const off_t kept : {off_t{0}, off_t{4096}, off_t{200'000}, off_t{5 << 20}}) {
    const Cached cached;
    const HostMemoryRef memory = cached.map();
    CHECK(::truncate(cached.temporary.path.c_str(), kept) == 0);
    bool was_read = false;
    CHECK(tables.map_unknown(memory->data() + cached.pages().begin, memory->data() + cached.pages().end, was_read) ==
          EFAULT);
  }
}

TEST(paging_in_of_what_is_not_known_reads_it) {
  const PageTables tables;
  for (const bool cold : {false, true}) {
    const Cached cached;
    if (cold) cached.evict();
    cached.file->refusals() = 1 | 2;
    const HostMemoryRef memory = cached.map();
    Pace pace;
    PagePrices prices(1);
    page_in(*cached.file, memory->data(), cached.range, tables, pace, prices, no_look);
    LoadMappings mappings;
    CacheFiller filler(mappings);
    CHECK(filler.fill(*cached.file, cached.range, /*known=*/false));
    CHECK(cached_bytes_by_mincore(*cached.file, cached.range).value_or(cached.range.size()) == cached.range.size());
  }
}

TEST(who_gave_up_fills_no_more) {
  const Cached cached;
  cached.evict();
  LoadMappings mappings;
  CacheFiller filler(mappings);
  mappings.give_up();
  CHECK(!filler.fill(*cached.file, cached.range, /*known=*/true));
}

TEST(only_what_says_nothing_of_the_bytes_is_a_refusal) {
  for (const int error_number : {0, EFAULT, EIO, EHWPOISON, ENOMEM}) CHECK(!PageTables::is_refusal(error_number));
  for (const int error_number : {EPERM, ENOSYS, EINVAL, EACCES, EAGAIN, ENODEV, EOPNOTSUPP})
    CHECK(PageTables::is_refusal(error_number));
}
