// torch's allocator of page-locked memory, with poison in what it hands out again.
#include "host_poison.h"

#include <ATen/core/CachingHostAllocator.h>

#include <cstring>
#include <utility>

namespace simulated_cuda {
namespace {

constexpr int kHandedOut = 0xEE;

class PoisoningAllocator final : public at::HostAllocator {
 public:
  explicit PoisoningAllocator(at::HostAllocator* under) : under_(under) {}

  at::DataPtr allocate(size_t bytes) override {
    at::DataPtr memory = under_->allocate(bytes);
    if (memory.get() != nullptr) std::memset(memory.get(), kHandedOut, bytes);
    return memory;
  }
  at::DeleterFnPtr raw_deleter() const override { return under_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { under_->copy_data(to, from, bytes); }
  bool record_event(void* ptr, void* ctx, c10::Stream stream) override {
    return under_->record_event(ptr, ctx, stream);
  }
  void empty_cache() override { under_->empty_cache(); }
  at::HostStats get_stats() override { return under_->get_stats(); }
  void reset_accumulated_stats() override { under_->reset_accumulated_stats(); }
  void reset_peak_stats() override { under_->reset_peak_stats(); }
  void begin_allocate_to_pool(c10::MempoolId_t id, std::function<bool(c10::Stream)> filter) override {
    under_->begin_allocate_to_pool(id, std::move(filter));
  }
  void end_allocate_to_pool(c10::MempoolId_t id) override { under_->end_allocate_to_pool(id); }
  void release_pool(c10::MempoolId_t id) override { under_->release_pool(id); }

 private:
  at::HostAllocator* const under_;
};

}  // namespace

void poison_pinned_memory() {
  static auto* const ours = new PoisoningAllocator(at::getHostAllocator(at::kCUDA));
  at::setHostAllocator(at::kCUDA, ours, /*priority=*/1);
}

}  // namespace simulated_cuda
