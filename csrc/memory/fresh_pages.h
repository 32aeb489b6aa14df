#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "memory/backed_pages.h"
#include "memory/page_prices.h"

namespace weightload {

// Finds pages for the caller's memory that has none yet, as that of parameters which were made a moment ago: in huge
// pages, or in what the caller would have got, by what either costs. Only whole huge pages' worths that lie within the
// memory and have no page at all; the rest is left to whoever writes. Many threads.
//
// Advice on a part of a mapping makes it two or three, of which a process has 65,530 (vm.max_map_count), and what that
// takes from others they are refused later. So a process does this for so many targets' worths of windows, and from
// then on leaves all to whoever writes. Advice of the caller's own against huge pages (MADV_NOHUGEPAGE) cannot be seen,
// and is overruled.
//
// A torch.empty() of many megabytes is fresh memory from the system. Reading 2.5 GB into it took 0.77 s in single
// pages, three quarters of it page faults (csrc/notes/memory.md, "The caller's fresh memory").
class FreshPages {
 public:
  explicit FreshPages(BackedPages& backed) : backed_(backed) {}

  static constexpr int64_t kMostTargets = 2048;

  // Of [begin, begin + size), which is to be written to next and lies within `memory`.
  void fault_in(char* begin, size_t size, char* memory, size_t memory_size);

 private:
  BackedPages& backed_;
  PagePrices prices_{1.5};                // as a load's own memory: see BlockCache
  std::atomic<bool> can_fault_in_{true};  // false once the system has refused
};

// For tests: so many more targets of this process.
void set_fresh_targets(int64_t left);

}  // namespace weightload
