// The most heap memory that a piece of code had at any one time. Needs a sanitizer's allocator, which tells of every
// allocation. One thread, one object at a time.
#pragma once
#include <cstdint>

class PeakMemory {
 public:
  PeakMemory();
  ~PeakMemory();
  PeakMemory(const PeakMemory&) = delete;
  PeakMemory& operator=(const PeakMemory&) = delete;

  uint64_t bytes() const;
};
