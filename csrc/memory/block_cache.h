#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "memory/host_memory.h"
#include "memory/huge_region.h"
#include "memory/page_prices.h"

namespace weightload {

// Hands out blocks for one load, and takes back those that no tensor refers to any more.
//
// Fresh memory is dear (see memory/spare_memory.h). A consumer that drops tensors as it goes (copies them into its
// parameters, say) therefore gets the same few blocks again and again. A block comes back only when its last tensor
// is gone, so nothing changes under anybody.
class BlockCache : public std::enable_shared_from_this<BlockCache> {
 public:
  // Keeps at most `max_bytes` of memory that is not in use.
  explicit BlockCache(uint64_t max_bytes);
  ~BlockCache() { close(); }

  // Like allocate_block(), in the pages that are cheaper now, or in huge ones.
  HostMemoryRef allocate(uint64_t size);
  HostMemoryRef allocate_huge(uint64_t size);

  // Gives what is kept to the next load, but goes on keeping.
  void release() noexcept;

  // Gives what is kept to the next load of the process, now and from now on. Blocks in use stay valid.
  void close() noexcept;

 private:
  friend class CachedBlock;
  void take_back(const HugeRegion& region) noexcept;
  HostMemoryRef allocate(uint64_t size, Pages pages, bool must_be_huge);
  bool find(size_t least, bool must_be_huge, HugeRegion& found);

  // In a forked child a thread of the parent may hold the mutex for ever; what is kept stays kept there.
  bool forked() const;

  // Single pages cost their users more later (address translation, giving them back), and disks more when they write
  // into them.
  PagePrices prices_{1.5};
  std::atomic<bool> can_fault_in_{true};  // false once the system has refused
  const uint64_t max_bytes_;
  const uint32_t fork_generation_;
  std::mutex mutex_;  // guards all below
  std::vector<HugeRegion> kept_;
  uint64_t kept_bytes_ = 0;
  bool open_ = true;
};

}  // namespace weightload
