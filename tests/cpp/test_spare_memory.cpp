#include "memory/spare_memory.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/pages.h"
#include "check.h"

using namespace weightload;

namespace {

constexpr size_t kMiB = 1 << 20;

// Keeps nothing of the tests before.
struct Limit {
  explicit Limit(uint64_t bytes) {
    spare_memory::release();
    spare_memory::set_limit(bytes);
  }
  ~Limit() {
    spare_memory::set_limit(0);
    CHECK(spare_memory::kept_bytes() == 0);
  }
};

// Of this process, in bytes.
uint64_t address_space() {
  uint64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * page_bytes();
}

}  // namespace

TEST(what_was_given_is_taken_again) {
  const Limit limit(64 * kMiB);
  const HugeRegion first = spare_memory::take(5 * kMiB);
  CHECK(first.used == 6 * kMiB);
  std::memset(first.start, 1, first.used);
  spare_memory::give(first);
  CHECK(spare_memory::kept_bytes() == 6 * kMiB);
  const HugeRegion again = spare_memory::take(6 * kMiB);
  CHECK(again.start == first.start && again.used == first.used);
  CHECK(spare_memory::kept_bytes() == 0);
  spare_memory::give(again);
}

TEST(a_part_of_a_larger_one_is_taken_and_joined_again) {
  const Limit limit(64 * kMiB);
  const HugeRegion large = spare_memory::take(16 * kMiB);
  spare_memory::give(large);
  std::vector<HugeRegion> parts;
  for (int i = 0; i < 4; ++i) parts.push_back(spare_memory::take(4 * kMiB));
  CHECK(spare_memory::kept_bytes() == 0);
  for (const HugeRegion& part : parts) CHECK(part.start >= large.start && part.start < large.start + large.used);
  for (const size_t i : {0u, 2u, 1u, 3u}) {
    std::memset(parts[i].start, static_cast<int>(i), parts[i].used);
    spare_memory::give(parts[i]);
  }
  const HugeRegion whole = spare_memory::take(16 * kMiB);
  CHECK(whole.start == large.start && whole.used == large.used);
  std::memset(whole.start, 9, whole.used);
  spare_memory::give(whole);
}

TEST(the_smallest_that_is_large_enough_is_taken) {
  const Limit limit(64 * kMiB);
  const HugeRegion large = spare_memory::take(8 * kMiB), between = spare_memory::take(2 * kMiB),
                   small = spare_memory::take(4 * kMiB);
  spare_memory::give(large);
  spare_memory::give(small);
  const HugeRegion taken = spare_memory::take(4 * kMiB);
  CHECK(taken.start == small.start);
  for (const HugeRegion& region : {between, taken}) spare_memory::give(region);
}

TEST(no_more_is_kept_than_may_be_and_the_oldest_goes) {
  const Limit limit(8 * kMiB);
  std::vector<HugeRegion> regions, between;
  for (int i = 0; i < 3; ++i) {  // apart from each other, so that they are not joined
    regions.push_back(spare_memory::take(4 * kMiB));
    between.push_back(spare_memory::take(2 * kMiB));
  }
  for (const HugeRegion& region : regions) spare_memory::give(region);
  CHECK(spare_memory::kept_bytes() == 8 * kMiB);
  const HugeRegion one = spare_memory::take(4 * kMiB), other = spare_memory::take(4 * kMiB);
  for (const HugeRegion& taken : {one, other})
    CHECK(taken.start == regions[1].start || taken.start == regions[2].start);
  spare_memory::give(spare_memory::take(12 * kMiB));  // more than may be kept
  CHECK(spare_memory::kept_bytes() <= 8 * kMiB);
  for (const HugeRegion& region : {one, other, between[0], between[1], between[2]}) spare_memory::give(region);
}

TEST(a_few_bytes_beyond_a_huge_page_do_not_cost_another) {
  const size_t size = 4 * kMiB + 100;
  const HugeRegion region = spare_memory::take(size);
  std::memset(region.start, 1, size);
  std::vector<unsigned char> pages(region.used / 4096);
  CHECK(::mincore(region.start, region.used, pages.data()) == 0);
  CHECK(std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; }) == 4 * 256 + 1);
  spare_memory::give(region);
}

TEST(nothing_is_kept_by_default) {
  spare_memory::give(spare_memory::take(4 * kMiB));
  CHECK(spare_memory::kept_bytes() == 0);
}

TEST(what_is_kept_goes_before_memory_runs_out) {
  const Limit limit(1024 * kMiB);
  spare_memory::give(spare_memory::take(512 * kMiB));
  CHECK(spare_memory::kept_bytes() == 512 * kMiB);
  const pid_t child = ::fork();  // a limit for itself; the child keeps nothing, so it begins anew
  if (child == 0) ::_exit(spare_memory::kept_bytes() == 0 ? 0 : 1);
  int status = -1;
  CHECK(::waitpid(child, &status, 0) == child && status == 0);
  CHECK_THROWS(spare_memory::take(1ull << 62), Error, error.kind == ErrorKind::memory);
  CHECK(spare_memory::kept_bytes() == 0);
}

TEST(locked_memory_is_not_kept) {
  const Limit limit(64 * kMiB);
  const HugeRegion region = spare_memory::take(2 * kMiB);
  if (::syscall(SYS_mlock, region.start, region.used) != 0) return;  // no right to; sanitizers ignore mlock()
  spare_memory::give(region);
  CHECK(spare_memory::kept_bytes() == 0);
}

TEST(nothing_is_kept_where_address_space_is_limited) {
  for (const auto what : {RLIMIT_AS, RLIMIT_DATA}) {
    const Limit limit(64 * kMiB);
    const HugeRegion region = spare_memory::take(2 * kMiB);
    spare_memory::give(spare_memory::take(4 * kMiB));
    CHECK(spare_memory::kept_bytes() == 4 * kMiB);
    struct rlimit before;
    CHECK(::getrlimit(what, &before) == 0);
    const struct rlimit finite{rlim_t{1} << 60, before.rlim_max};
    CHECK(::setrlimit(what, &finite) == 0);
    spare_memory::give(region);  // what was kept before goes, too
    CHECK(spare_memory::kept_bytes() == 0);
    spare_memory::set_limit(64 * kMiB);
    spare_memory::give(spare_memory::take(2 * kMiB));
    CHECK(spare_memory::kept_bytes() == 0);
    CHECK(::setrlimit(what, &before) == 0);
  }
}

TEST(what_is_kept_goes_before_memory_is_refused) {
  const Limit limit(512 * kMiB);
  spare_memory::give(spare_memory::take(512 * kMiB));
  CHECK(spare_memory::kept_bytes() == 512 * kMiB);
  struct rlimit before;
  CHECK(::getrlimit(RLIMIT_AS, &before) == 0);
  const struct rlimit tight{address_space() + 64 * kMiB, before.rlim_max};
  CHECK(::setrlimit(RLIMIT_AS, &tight) == 0);
  const HugeRegion larger = spare_memory::take(544 * kMiB);
  CHECK(spare_memory::kept_bytes() == 0);
  CHECK(::setrlimit(RLIMIT_AS, &before) == 0);
  unmap_huge(larger);
}

TEST(release_says_how_much_it_gave_back) {
  const Limit limit(64 * kMiB);
  spare_memory::give(spare_memory::take(6 * kMiB));
  CHECK(spare_memory::release() == 6 * kMiB);
  CHECK(spare_memory::release() == 0);
}

TEST(threads_take_and_give_at_once) {
  const Limit limit(24 * kMiB);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 60; ++i) {
        const HugeRegion region = spare_memory::take(static_cast<uint64_t>(1 + (i + t) % 5) * 2 * kMiB);
        for (size_t at = 0; at < region.used; at += kHugePage) region.start[at] = static_cast<char>(t);
        for (size_t at = 0; at < region.used; at += kHugePage) CHECK(region.start[at] == static_cast<char>(t));
        spare_memory::give(region);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(spare_memory::kept_bytes() <= 24 * kMiB);
}
