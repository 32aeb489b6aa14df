#pragma once
#include <atomic>
#include <cstddef>

#include "memory/backed_pages.h"
#include "memory/page_prices.h"

namespace weightload {

// Finds pages for the caller's memory that has none yet, as that of parameters which were made a moment ago: in huge
// pages, or in what the caller would have got, by what either costs. Only whole huge pages' worths that lie within the
// memory and have no page at all; the rest is left to whoever writes. Many threads.
//
// A torch.empty() of many megabytes is fresh memory from the system. Reading 2.5 GB into it took 0.77 s in single
// pages, three quarters of it page faults (csrc/notes/memory.md, "The caller's fresh memory").
class FreshPages {
 public:
  explicit FreshPages(BackedPages& backed) : backed_(backed) {}

  // Of [begin, begin + size), which is to be written to next and lies within `memory`.
  void fault_in(char* begin, size_t size, char* memory, size_t memory_size);

 private:
  BackedPages& backed_;
  PagePrices prices_{1.5};                // as a load's own memory: see BlockCache
  std::atomic<bool> can_fault_in_{true};  // false once the system has refused
};

}  // namespace weightload
