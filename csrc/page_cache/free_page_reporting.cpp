#include "page_cache/free_page_reporting.h"

#include <atomic>
#include <fstream>

namespace weightload {
namespace {

std::atomic<int> pretended{-1};

// The order of the blocks that are reported; out of all bounds until a driver has asked for them.
bool read_order() {
  constexpr unsigned kLargestOrder = 20;
  std::ifstream file("/sys/module/page_reporting/parameters/page_reporting_order");
  unsigned order = 0;
  return static_cast<bool>(file >> order) && order <= kLargestOrder;
}

}  // namespace

bool free_pages_are_reported() {
  static const bool reported = read_order();
  const int pretence = pretended.load(std::memory_order_relaxed);
  return pretence < 0 ? reported : pretence == 1;
}

void pretend_free_pages_are_reported(std::optional<bool> reported) { pretended = reported ? *reported : -1; }

}  // namespace weightload
