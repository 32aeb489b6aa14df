#include "memory/block_cache.h"

#include <algorithm>

#include "base/byte_range.h"
#include "base/fork_generation.h"
#include "base/pages.h"
#include "memory/spare_memory.h"

namespace weightload {

// A block that goes back to its cache.
class CachedBlock final : public HostMemory {
 public:
  CachedBlock(std::shared_ptr<BlockCache> cache, const HugeRegion& region, size_t size)
      : cache_(std::move(cache)), region_(region) {
    data_ = region.start;
    size_ = size;
  }
  ~CachedBlock() override {
    region_.fresh = false;
    cache_->take_back(region_);
  }

  void fault_in(char* begin, size_t size) override {
    if (!region_.fresh) return;
    for (char* window = first_window(begin); window < begin + size; window += kHugePage) {
      if (!cache_->can_fault_in_.load(std::memory_order_relaxed)) return;
      fault_in_window(window);
    }
  }

  bool in_huge_pages() const override {
    return region_.pages == Pages::huge && (!region_.fresh || cache_->prices_.cheaper() == Pages::huge);
  }

 private:
  // A window is a huge page's worth of memory. Of several reads into one, that of its first byte brings it in; what
  // lies before a block's first byte (Layout) is nobody's.
  char* first_window(char* begin) const {
    const auto offset = static_cast<size_t>(begin - region_.start);
    return offset < page_bytes() ? region_.start : region_.start + round_up(offset, kHugePage);
  }

  void fault_in_window(char* window) {
    const auto left = static_cast<size_t>(region_.start + round_up(size_, page_bytes()) - window);
    if (left < kHugePage) {  // the end of the block: no price
      weightload::fault_in(window, left);
      return;
    }
    // Whatever it is that refuses: the read finds it, or does without.
    if (!fault_in_cheaply(window, region_.pages, cache_->prices_)) cache_->can_fault_in_ = false;
  }

  std::shared_ptr<BlockCache> cache_;
  HugeRegion region_;
};

BlockCache::BlockCache(uint64_t max_bytes) : max_bytes_(max_bytes), fork_generation_(fork_generation()) {}

bool BlockCache::forked() const { return fork_generation_ != fork_generation(); }

HostMemoryRef BlockCache::allocate(uint64_t size) { return allocate(size, prices_.cheaper(), false); }

HostMemoryRef BlockCache::allocate_huge(uint64_t size) { return allocate(size, Pages::huge, true); }

HostMemoryRef BlockCache::allocate(uint64_t size, Pages pages, bool must_be_huge) {
  if (size < kHugePage) return allocate_block(size);
  HugeRegion region;
  if (!find(round_up(size, kHugePage), must_be_huge, region)) {
    region = spare_memory::take(size, pages, must_be_huge);
  }
  return HostMemoryRef::adopt(new CachedBlock(shared_from_this(), region, size));
}

// The smallest that fits, if it is not more than twice as large as needed.
bool BlockCache::find(size_t least, bool must_be_huge, HugeRegion& found) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto best = kept_.end();
  for (auto it = kept_.begin(); it != kept_.end(); ++it) {
    if (must_be_huge && it->pages != Pages::huge) continue;
    if (it->used >= least && it->used / 2 <= least && (best == kept_.end() || it->used < best->used)) best = it;
  }
  if (best == kept_.end()) return false;
  found = *best;
  kept_bytes_ -= found.used;
  kept_.erase(best);
  return true;
}

void BlockCache::take_back(const HugeRegion& region) noexcept {
  if (!forked()) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (open_ && kept_bytes_ + region.used <= max_bytes_) {
      try {
        kept_.push_back(region);
        kept_bytes_ += region.used;
        return;
      } catch (const std::bad_alloc&) {
        // then it is kept for other loads, or goes back to the kernel
      }
    }
  }
  spare_memory::give(region);
}

void BlockCache::close() noexcept {
  if (forked()) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = false;
  }
  release();
}

void BlockCache::release() noexcept {
  std::vector<HugeRegion> all;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    all.swap(kept_);
    kept_bytes_ = 0;
  }
  for (const HugeRegion& region : all) spare_memory::give(region);
}

}  // namespace weightload
