#include "memory/fresh_pages.h"

#include <cstdint>

#include "base/byte_range.h"
#include "base/pages.h"
#include "memory/huge_region.h"

namespace weightload {
namespace {

constexpr int64_t kTarget = 1 << 20;  // the parts of a target that its windows are counted in

std::atomic<int64_t> left{FreshPages::kMostTargets * kTarget};

}  // namespace

void set_fresh_targets(int64_t targets) { left = targets * kTarget; }

void FreshPages::fault_in(char* begin, size_t size, char* memory, size_t memory_size) {
  if (memory_size < kHugePage || size == 0) return;
  const auto address = [](const char* at) { return reinterpret_cast<uintptr_t>(at); };
  const uintptr_t least = round_up(address(memory), kHugePage);
  const uintptr_t most = round_down(address(memory) + memory_size, kHugePage);
  if (least >= most) return;
  const int64_t window_costs = kTarget / static_cast<int64_t>((most - least) / kHugePage);
  char* const first = begin - address(begin) % kHugePage;
  for (char* window = first; window < begin + size; window += kHugePage) {
    if (address(window) < least || address(window) >= most) continue;
    if (!can_fault_in_.load(std::memory_order_relaxed)) return;
    if (left.load(std::memory_order_relaxed) < window_costs) return;
    if (!backed_.has_none(window, kHugePage)) continue;
    left.fetch_sub(window_costs, std::memory_order_relaxed);
    if (!fault_in_cheaply(window, Pages::single, prices_)) can_fault_in_ = false;
  }
}

}  // namespace weightload
