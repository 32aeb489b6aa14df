#include "memory/block_cache.h"

#include <algorithm>

#include "base/byte_range.h"
#include "base/fork_generation.h"
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
  ~CachedBlock() override { cache_->take_back(region_); }

 private:
  std::shared_ptr<BlockCache> cache_;
  HugeRegion region_;
};

BlockCache::BlockCache(uint64_t max_bytes) : max_bytes_(max_bytes), fork_generation_(fork_generation()) {}

bool BlockCache::forked() const { return fork_generation_ != fork_generation(); }

HostMemoryRef BlockCache::allocate(uint64_t size) {
  if (size < kHugePage) return allocate_block(size);
  HugeRegion region;
  if (!find(round_up(size, kHugePage), region)) region = spare_memory::take(size);
  return HostMemoryRef::adopt(new CachedBlock(shared_from_this(), region, size));
}

// The smallest that fits, if it is not more than twice as large as needed.
bool BlockCache::find(size_t least, HugeRegion& found) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto best = kept_.end();
  for (auto it = kept_.begin(); it != kept_.end(); ++it) {
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
