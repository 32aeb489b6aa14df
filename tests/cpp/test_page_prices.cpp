#include "memory/page_prices.h"

#include <sys/mman.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "base/byte_range.h"
#include "base/pages.h"
#include "base/unique_fd.h"
#include "check.h"
#include "memory/block_cache.h"
#include "memory/fresh_pages.h"
#include "memory/spare_memory.h"

using namespace weightload;
using std::chrono::microseconds;

namespace {

constexpr size_t kMiB = 1 << 20;
constexpr microseconds kCheap{200}, kDear{5000}, kSingle{1000};

// How many of the next windows are huge, at these costs.
int huge_of(PagePrices& prices, int windows, microseconds huge, microseconds single) {
  int count = 0;
  for (int i = 0; i < windows; ++i) {
    const Pages pages = prices.choose();
    count += pages == Pages::huge;
    prices.record(pages, pages == Pages::huge ? huge : single);
  }
  return count;
}

struct Costs {
  Costs(microseconds huge, microseconds single) { set_page_costs(huge, single); }
  ~Costs() { measure_page_costs(); }
};

// What the kernel says of the advice for the page at `address`: "hg", "nh" or nothing.
std::string advice_at(const char* address) {
  std::ifstream maps("/proc/self/smaps");
  std::string line;
  bool here = false;
  while (std::getline(maps, line)) {
    unsigned long begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2)
      here = begin <= reinterpret_cast<unsigned long>(address) && reinterpret_cast<unsigned long>(address) < end;
    if (!here || line.rfind("VmFlags:", 0) != 0) continue;
    for (const char* flag : {" hg", " nh"}) {
      if (line.find(flag) != std::string::npos) return flag + 1;
    }
    return "";
  }
  return "";
}

// Whether the page at `address` is there.
bool is_there(const char* address) {
  unsigned char answer = 0;
  char* const page = const_cast<char*>(address) - reinterpret_cast<uintptr_t>(address) % page_bytes();
  return ::mincore(page, 1, &answer) == 0 && (answer & 1) != 0;
}

// Memory of which nothing was used before, all of it brought in.
struct Fresh {
  explicit Fresh(size_t size) : cache(std::make_shared<BlockCache>(0)), block(cache->allocate(size)) {
    block->fault_in(block->data(), size);
    huge = block->in_huge_pages();
  }
  int windows_advised(const char* advice) const {
    int count = 0;
    for (size_t at = 0; at + kHugePage <= block->size(); at += kHugePage)
      count += advice_at(block->data() + at) == advice;
    return count;
  }
  std::shared_ptr<BlockCache> cache;
  HostMemoryRef block;
  bool huge = false;
};

// Memory of the caller's, as torch makes it: from somewhere in a huge page to somewhere in another. Nobody has touched
// it.
struct Callers {
  explicit Callers(int flags = MAP_PRIVATE | MAP_ANONYMOUS, int fd = -1) {
    begin = static_cast<char*>(::mmap(nullptr, kSize, PROT_READ | PROT_WRITE, flags, fd, 0));
    CHECK(begin != MAP_FAILED);
    first = begin + round_up(reinterpret_cast<uintptr_t>(begin), kHugePage) - reinterpret_cast<uintptr_t>(begin);
    data = first + kMiB / 2;
  }
  ~Callers() { ::munmap(begin, kSize); }
  void fault_in(size_t from, size_t to) { FreshPages(backed).fault_in(data + from, to - from, data, 9 * kMiB); }
  // Of `windows`, a huge page each from `first`.
  bool are_there(std::initializer_list<int> windows) const {
    for (const int window : windows) {
      const char* const at = first + static_cast<size_t>(window) * kHugePage;
      if (!is_there(at) || !is_there(at + kHugePage - 1)) return false;
    }
    return true;
  }
  static constexpr size_t kSize = 16 * kMiB;
  BackedPages backed;
  char* begin;
  char* first;
  char* data;
};

}  // namespace

TEST(the_cheaper_pages_are_taken) {
  PagePrices bare_metal(1.5), reporting(1.5);
  CHECK(huge_of(bare_metal, 2000, kCheap, kSingle) == 2000);  // the others are not even tried
  CHECK(huge_of(reporting, 2000, kDear, kSingle) < 25);
  CHECK(bare_metal.cheaper() == Pages::huge && reporting.cheaper() == Pages::single);
}

TEST(what_is_settled_is_not_tried) {
  PagePrices prices(1.5);
  prices.settle(Pages::single);
  CHECK(huge_of(prices, 1000, kCheap, kDear) == 0);
}

TEST(the_first_windows_tell) {
  PagePrices prices(1.5);
  huge_of(prices, 8, kDear, kSingle);
  CHECK(prices.cheaper() == Pages::single);
}

TEST(huge_pages_are_taken_where_the_two_cost_about_the_same) {
  PagePrices prices(1.5);
  CHECK(huge_of(prices, 1000, kSingle, kSingle) > 960);
  PagePrices slightly_dearer(1.5);
  CHECK(huge_of(slightly_dearer, 1000, kSingle * 14 / 10, kSingle) > 960);
}

TEST(a_change_is_noticed) {
  PagePrices prices(1.5);
  huge_of(prices, 100, kCheap, kSingle);
  CHECK(huge_of(prices, 100, kDear, kSingle) < 15);  // the pages in use have become dear
  huge_of(prices, 100, kDear, kSingle);
  CHECK(huge_of(prices, 600, kCheap, kSingle) > 300);  // others have become cheap
}

TEST(one_cheap_page_is_an_accident) {
  PagePrices prices(1.5);
  huge_of(prices, 100, kDear, kSingle);
  for (int i = 0; i < 1000; ++i) {
    const Pages pages = prices.choose();
    prices.record(pages, pages == Pages::huge ? (i % 3 == 0 ? kCheap : kDear) : kSingle);
  }
  CHECK(prices.cheaper() == Pages::single);
}

TEST(trials_become_rare) {
  PagePrices prices(1.5);
  huge_of(prices, 5000, kDear, kSingle);
  CHECK(huge_of(prices, 5000, kDear, kSingle) < 20);
}

TEST(fresh_memory_is_brought_in_in_the_cheaper_pages) {
  {
    const Costs costs(kDear, kSingle);
    const Fresh fresh(64 * kMiB);
    CHECK(fresh.windows_advised("nh") == 32 - 4 && fresh.windows_advised("hg") == 4);
    CHECK(!fresh.huge);
    for (size_t at = 0; at < fresh.block->size(); at += 4096) CHECK(is_there(fresh.block->data() + at));
    // What is allocated next is advised as a whole.
    const HostMemoryRef next = fresh.cache->allocate(64 * kMiB);
    CHECK(advice_at(next->data()) == "nh");
    CHECK(!is_there(next->data()));
    CHECK(advice_at(fresh.cache->allocate_huge(64 * kMiB)->data()) == "hg");
  }
  const Costs costs(kCheap, kSingle);
  const Fresh fresh(64 * kMiB);
  CHECK(fresh.windows_advised("hg") == 32);
}

TEST(a_window_is_brought_in_by_the_read_of_its_first_byte) {
  const Costs costs(kCheap, kSingle);
  const auto cache = std::make_shared<BlockCache>(0);
  const HostMemoryRef block = cache->allocate(9 * kMiB);
  char* const data = block->data();
  block->fault_in(data + 5 * kMiB, kMiB / 2);
  CHECK(!is_there(data + 5 * kMiB) && !is_there(data + 4 * kMiB));
  block->fault_in(data + 5 * kMiB, 2 * kMiB);
  CHECK(!is_there(data + 5 * kMiB) && is_there(data + 6 * kMiB) && is_there(data + 8 * kMiB - 1));
  block->fault_in(data + 4095, 1);  // before it lies nothing
  CHECK(is_there(data));
  block->fault_in(data + 8 * kMiB, kMiB);  // the end of the block
  CHECK(is_there(data + 8 * kMiB) && is_there(data + 9 * kMiB - 1));
}

TEST(memory_that_was_used_before_has_no_price) {
  const Costs costs(kDear, kSingle);
  const auto cache = std::make_shared<BlockCache>(64 * kMiB);
  char* address = nullptr;
  {
    const HostMemoryRef block = cache->allocate(8 * kMiB);
    address = block->data();
    std::memset(address, 1, block->size());
  }
  const HostMemoryRef again = cache->allocate(8 * kMiB);
  CHECK(again->data() == address);
  again->fault_in(again->data(), again->size());
  CHECK(again->in_huge_pages());
  CHECK(again->data()[0] == 1 && advice_at(again->data()) == "hg");
}

TEST(spare_memory_knows_its_pages) {
  spare_memory::set_limit(64 * kMiB);
  HugeRegion region = spare_memory::take(8 * kMiB, Pages::single);
  CHECK(region.fresh && region.pages == Pages::single);
  std::memset(region.start, 1, region.used);
  spare_memory::give(region);
  region = spare_memory::take(8 * kMiB);
  CHECK(!region.fresh && region.pages == Pages::single);
  spare_memory::give(region);
  spare_memory::set_limit(0);
}

TEST(a_few_bytes_have_no_price) {
  PagePrices prices(1.5);
  for (int i = 0; i < 100; ++i) {
    CHECK(prices.choose(4096) == Pages::huge);
    prices.record(Pages::huge, kDear, 4096);
  }
  for (int i = 0; i < 8; ++i) {
    const Pages pages = prices.choose(8 * kMiB);
    prices.record(pages, pages == Pages::huge ? kDear * 4 : kSingle * 4, 8 * kMiB);
  }
  CHECK(prices.cheaper() == Pages::single);
}

TEST(the_handicap_decides_between_equals) {
  PagePrices prefers_single(0.85);
  huge_of(prefers_single, 100, kSingle, kSingle);
  CHECK(prefers_single.cheaper() == Pages::single);
  huge_of(prefers_single, 2000, kCheap, kSingle);
  CHECK(prefers_single.cheaper() == Pages::huge);
}

TEST(a_trial_whose_reads_failed_is_not_the_last) {
  PagePrices prices(1.5);
  for (int i = 0; i < 4; ++i) prices.choose();  // and nothing is paid
  int unpaid = 4;
  for (int i = 0; i < 2000; ++i) {
    const Pages pages = prices.choose();
    if (pages == Pages::single && unpaid-- > 0) continue;  // nor for the first of these
    prices.record(pages, pages == Pages::huge ? kDear : kSingle);
  }
  CHECK(prices.cheaper() == Pages::single);
}

TEST(prices_that_are_about_the_same_do_not_change_the_kind_all_the_time) {
  PagePrices prices(1.5);
  int changes = 0;
  Pages before = Pages::huge;
  for (int i = 0; i < 20000; ++i) {
    const Pages pages = prices.choose();
    changes += pages != before;
    before = pages;
    const auto noise = microseconds(i * 7919 % 100);
    prices.record(pages, (pages == Pages::huge ? kSingle * 3 / 2 : kSingle) + noise);
  }
  CHECK(changes < 500);  // each is a mapping more
}

TEST(a_bounce_buffer_is_never_of_spare_single_pages) {
  spare_memory::set_limit(64 * kMiB);
  spare_memory::give(spare_memory::take(8 * kMiB, Pages::single));
  const auto cache = std::make_shared<BlockCache>(64 * kMiB);
  CHECK(cache->allocate_huge(4 * kMiB)->in_huge_pages());
  CHECK(!cache->allocate(8 * kMiB)->in_huge_pages());  // which others may well use again
  cache->close();
  spare_memory::set_limit(0);
}

TEST(a_callers_fresh_memory_is_brought_in_a_window_at_a_time) {
  const Costs costs(kCheap, kSingle);
  Callers memory;
  memory.fault_in(3 * kMiB, 3 * kMiB + 1);  // in the middle of a window
  CHECK(memory.are_there({1}) && !is_there(memory.first + 2 * kHugePage) && !is_there(memory.first));
  CHECK(advice_at(memory.first + kHugePage) == "hg" && advice_at(memory.first + 2 * kHugePage) == "");
  memory.fault_in(0, 9 * kMiB);
  CHECK(memory.are_there({1, 2, 3}));
  // Nothing that is not of the memory: before its first whole window, and after the last.
  CHECK(!is_there(memory.data) && !is_there(memory.first + 4 * kHugePage));
  CHECK(advice_at(memory.data) == "" && advice_at(memory.first + 4 * kHugePage) == "");
}

TEST(a_callers_fresh_memory_stays_as_it_is_where_huge_pages_are_dear) {
  const Costs costs(kDear, kSingle);
  Callers memory;
  FreshPages pages(memory.backed);
  std::vector<std::unique_ptr<Callers>> others;
  for (int i = 0; i < 8; ++i) {
    others.push_back(std::make_unique<Callers>());
    pages.fault_in(others.back()->data, 9 * kMiB, others.back()->data, 9 * kMiB);
    CHECK(others.back()->are_there({1, 2, 3}));
  }
  for (const int window : {1, 2, 3}) CHECK(advice_at(others.back()->first + window * kHugePage) == "");
}

TEST(a_callers_memory_that_is_there_is_left_alone) {
  const Costs costs(kCheap, kSingle);
  Callers memory;
  memory.first[2 * kHugePage + kMiB] = 'x';
  memory.fault_in(0, 9 * kMiB);
  CHECK(memory.are_there({1, 3}) && !is_there(memory.first + 2 * kHugePage));
  CHECK(memory.first[2 * kHugePage + kMiB] == 'x' && advice_at(memory.first + 2 * kHugePage) == "");
  Callers small;
  FreshPages(small.backed).fault_in(small.first, kHugePage - 1, small.first, kHugePage - 1);
  CHECK(!is_there(small.first));
}

TEST(memory_of_files_is_not_brought_in) {
  const Costs costs(kCheap, kSingle);
  const UniqueFd file(::memfd_create("fresh", MFD_CLOEXEC));
  CHECK(::ftruncate(file.get(), static_cast<off_t>(Callers::kSize)) == 0);
  for (Callers* const memory : {new Callers(MAP_SHARED, file.get()), new Callers(MAP_PRIVATE, file.get()),
                                new Callers(MAP_SHARED | MAP_ANONYMOUS)}) {
    memory->fault_in(0, 9 * kMiB);
    CHECK(advice_at(memory->first + kHugePage) == "" && !is_there(memory->first + kHugePage));
    delete memory;
  }
}

TEST(memory_that_cannot_be_written_to_is_not_asked_for_twice) {
  const Costs costs(kCheap, kSingle);
  Callers memory;
  CHECK(::mprotect(memory.begin, Callers::kSize, PROT_READ) == 0);
  FreshPages pages(memory.backed);
  pages.fault_in(memory.data, 9 * kMiB, memory.data, 9 * kMiB);
  CHECK(::mprotect(memory.begin, Callers::kSize, PROT_READ | PROT_WRITE) == 0);
  pages.fault_in(memory.data, 9 * kMiB, memory.data, 9 * kMiB);
  CHECK(!memory.are_there({1}) && !memory.are_there({2}));
}

TEST(a_process_splits_the_mappings_of_so_many_targets) {
  const Costs costs(kCheap, kSingle);
  set_fresh_targets(2);
  Callers first, second, third;
  for (Callers* const memory : {&first, &second, &third}) memory->fault_in(0, 9 * kMiB);
  set_fresh_targets(FreshPages::kMostTargets);
  CHECK(first.are_there({1, 2, 3}) && second.are_there({1, 2, 3}));
  CHECK(!is_there(third.first + kHugePage) && advice_at(third.first + kHugePage) == "");
}
