#include "read/read_rates.h"

#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

using namespace weightload;

namespace {

constexpr uint64_t kMiB = 1 << 20;

// How many of the next reads would be direct, each way taking the given time.
int direct_of(ReadRates& rates, int reads, uint64_t direct_ns, uint64_t buffered_ns) {
  int direct = 0;
  for (int i = 0; i < reads; ++i) {
    const bool is_direct = rates.choose_direct();
    direct += is_direct;
    rates.record(is_direct, kMiB, is_direct ? direct_ns : buffered_ns);
  }
  return direct;
}

}  // namespace

TEST(both_ways_are_tried_and_the_faster_one_wins) {
  ReadRates fast_direct, slow_direct;
  CHECK(direct_of(fast_direct, 1000, 1000, 2000) > 960);
  CHECK(direct_of(slow_direct, 1000, 2000, 1000) < 40);
}

TEST(the_first_reads_are_direct) {
  ReadRates rates;
  CHECK(direct_of(rates, 8, 1000, 1000) == 8);
  CHECK(direct_of(rates, 8, 1000, 1000) == 0);
}

TEST(a_disk_that_changes_is_noticed) {
  ReadRates rates;
  CHECK(direct_of(rates, 1000, 1000, 2000) > 960);
  direct_of(rates, 5000, 3000, 500);
  CHECK(direct_of(rates, 1000, 3000, 500) < 40);
}

TEST(small_reads_do_not_count) {
  ReadRates rates;
  for (int i = 0; i < 32; ++i) rates.choose_direct();
  for (int i = 0; i < 32; ++i) rates.record(true, 1000, 1'000'000);
  rates.record(true, kMiB, 1000);
  rates.record(false, kMiB, 2000);
  CHECK(direct_of(rates, 100, 1000, 2000) >= 98);
}

TEST(a_forked_child_begins_anew) {
  const auto file = File::open("/proc/self/exe");
  const ReadRates* const of_parent = &ReadRates::of(*file, ReadInto::pinned);
  const pid_t child = ::fork();
  if (child == 0) ::_exit(&ReadRates::of(*file, ReadInto::pinned) == of_parent ? 1 : 0);
  int status = -1;
  CHECK(::waitpid(child, &status, 0) == child && status == 0);
  CHECK(&ReadRates::of(*file, ReadInto::pinned) == of_parent);
}

TEST(files_of_one_file_system_share_their_rates_by_kind_of_memory) {
  const auto one = File::open("/proc/self/exe");
  const auto other = File::open("/proc/self/exe");
  CHECK(&ReadRates::of(*one, ReadInto::pageable) == &ReadRates::of(*other, ReadInto::pageable));
  CHECK(&ReadRates::of(*one, ReadInto::pageable) != &ReadRates::of(*other, ReadInto::pinned));
}
