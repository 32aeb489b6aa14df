#include "group/process_group.h"

#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "base/error.h"
#include "device/accelerator.h"
#include "device/plain_torch.h"

namespace weightload {
namespace {

using Milliseconds = std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;
using WorkRef = c10::intrusive_ptr<c10d::Work>;

// How often the host looks for something that cannot wake it: an event of an accelerator.
constexpr std::chrono::microseconds kWorkLook{50};

// c10d's exceptions carry a backtrace, which says nothing to the user of a load.
[[noreturn]] void rethrow_as_ours() {
  try {
    throw;
  } catch (const Error&) {
    throw;
  } catch (const c10::Error& error) {
    throw Error(ErrorKind::group, error.what_without_backtrace());
  } catch (const std::exception& error) {
    throw Error(ErrorKind::group, error.what());
  }
}

// Wakes a thread when all of some works have been done by their backend. Backends that order work on streams (NCCL) say
// so at once; the streams then see to the rest.
class Completion {
 public:
  void add(c10d::Work& work) {
    {
      std::lock_guard<std::mutex> lock(state_->mutex);
      ++state_->open;
    }
    work.getFuture()->addCallback([state = state_](c10::ivalue::Future&) {
      {
        std::lock_guard<std::mutex> lock(state->mutex);
        --state->open;
      }
      state->changed.notify_all();
    });
  }

  bool wait(Milliseconds patience) {
    std::unique_lock<std::mutex> lock(state_->mutex);
    return state_->changed.wait_for(lock, patience, [&] { return state_->open == 0; });
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    int open = 0;
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();  // the backend's threads may outlive the wait
};

// The works of one operation of ours.
class Works {
 public:
  explicit Works(std::vector<WorkRef> works) : works_(std::move(works)) {
    for (const WorkRef& work : works_) completion_.add(*work);
  }

  bool wait(Milliseconds patience) { return completion_.wait(patience); }

  // Throws what went wrong. Of works on streams, makes the current stream wait; the host does not.
  void finish() {
    const PlainTorch plain;
    for (const WorkRef& work : works_) work->wait();
    works_.clear();
  }

 private:
  std::vector<WorkRef> works_;
  Completion completion_;
};

// On host memory.
class HostPending : public Pending {
 public:
  explicit HostPending(std::vector<WorkRef> works) : works_(std::move(works)) {}

  bool wait(Milliseconds patience) override {
    if (!works_.wait(patience)) return false;
    try {
      works_.finish();
    } catch (...) {
      rethrow_as_ours();
    }
    return true;
  }

 private:
  Works works_;
};

// Torch 2.13 has a new name for it, which 2.8 lacks.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
WorkRef gather_into(c10d::ProcessGroup& group, at::Tensor all, at::Tensor mine) {
  return group._allgather_base(all, mine);
}
#pragma GCC diagnostic pop

Records split(const at::Tensor& all, uint32_t ranks) {
  const size_t size = all.nbytes() / ranks;
  const char* const data = static_cast<const char*>(all.const_data_ptr());
  Records records;
  for (uint32_t r = 0; r < ranks; ++r) records.emplace_back(data + r * size, size);
  return records;
}

class HostRecords final : public HostPending {
 public:
  HostRecords(std::vector<WorkRef> works, at::Tensor all, uint32_t ranks)
      : HostPending(std::move(works)), all_(std::move(all)), ranks_(ranks) {}
  Records records() override { return split(all_, ranks_); }

 private:
  at::Tensor all_;
  uint32_t ranks_;
};

// On a block of an accelerator, which is marked behind it on the collective stream.
class BlockPending final : public Pending {
 public:
  BlockPending(std::vector<WorkRef> works, std::shared_ptr<Device> device, DeviceBlockRef block)
      : works_(std::move(works)), device_(std::move(device)), block_(std::move(block)) {}

  bool wait(Milliseconds patience) override {
    if (!block_) return true;  // an event recorded again would lie behind later collectives
    if (!works_.wait(patience)) return false;
    try {
      device_->on_collective_stream([&] { works_.finish(); });
      device_->mark_shared(*block_);
      block_.reset();
    } catch (...) {
      rethrow_as_ours();
    }
    return true;
  }

 private:
  Works works_;
  std::shared_ptr<Device> device_;
  DeviceBlockRef block_;
};

// Records that came through an accelerator and are being copied to the host.
class DeviceRecords final : public Pending {
 public:
  DeviceRecords(WorkRef work, at::Tensor on_device, at::Tensor on_host, std::shared_ptr<Device> device, uint32_t ranks)
      : work_(std::move(work)),
        on_device_(std::move(on_device)),
        on_host_(std::move(on_host)),
        device_(std::move(device)),
        copied_(std::in_place, on_device_.device().type()),
        ranks_(ranks) {
    completion_.add(*work_);
  }
  ~DeviceRecords() override {
    try {
      const c10::DeviceGuard on_device(on_device_.device());  // see accelerator.cpp, Note [The current device]
      copied_.reset();
    } catch (const std::exception&) {
      // The device has failed; so has its event.
    }
  }

  bool wait(Milliseconds patience) override {
    const auto deadline = Clock::now() + patience;
    if (!completion_.wait(patience)) return false;
    try {
      const c10::DeviceGuard on_device(on_device_.device());
      if (work_) start_copy();
      while (!copied_->query()) {
        if (Clock::now() >= deadline) return false;
        std::this_thread::sleep_for(kWorkLook);
      }
    } catch (...) {
      rethrow_as_ours();
    }
    return true;
  }
  Records records() override {
    Records records = split(on_host_, ranks_);
    const auto is_empty = [](const std::string& record) { return record.find_first_not_of('\0') == std::string::npos; };
    if (std::any_of(records.begin(), records.end(), is_empty))
      throw Error(ErrorKind::group, "the communicator was aborted before every rank's record had come");
    return records;
  }

 private:
  void start_copy() {
    device_->on_collective_stream([&] {
      work_->wait();
      on_host_.copy_(on_device_, /*non_blocking=*/true);
      const c10::impl::VirtualGuardImpl backend(on_device_.device().type());
      copied_->record(backend.getStream(on_device_.device()));
    });
    work_ = {};
  }

  WorkRef work_;
  at::Tensor on_device_, on_host_;
  std::shared_ptr<Device> device_;
  std::optional<c10::Event> copied_;
  uint32_t ranks_;
  Completion completion_;
};

class ProcessGroupCollective final : public Collective {
 public:
  ProcessGroupCollective(c10::intrusive_ptr<c10d::ProcessGroup> group, c10::Device type, std::shared_ptr<Device> device)
      : group_(std::move(group)), type_(type), device_(std::move(device)) {
    const std::vector<c10::Device> types = group_->getDeviceTypes();
    const auto moves = [&](c10::DeviceType wanted) {
      return std::any_of(types.begin(), types.end(), [&](c10::Device one) { return one.type() == wanted; });
    };
    if (!moves(type_.type()))
      throw Error(ErrorKind::usage,
                  "the group has no backend for memory of " + c10::DeviceTypeName(type_.type(), true));
    cpu_records_ = moves(c10::kCPU);
    // Makes the collective stream now: blocks that are let go of before their collective are recorded on it.
    if (device_) device_->on_collective_stream([] {});
    // Gloo's all-gather copies everything twice more; broadcasts go in place.
    stripes_by_broadcast_ = type_.is_cpu() || group_->getBackend(type_.type())->getBackendName() == "gloo";
  }

  uint32_t rank() const override { return static_cast<uint32_t>(group_->getRank()); }
  uint32_t ranks() const override { return static_cast<uint32_t>(group_->getSize()); }

  std::unique_ptr<Pending> gather(const std::string& record) override try {
    const PlainTorch plain;
    const auto size = static_cast<int64_t>(record.size());
    const int64_t total = size * group_->getSize();
    if (cpu_records_) {
      const at::Tensor all = at::empty({total}, at::TensorOptions().dtype(at::kByte));
      at::Tensor mine = all.narrow(0, size * group_->getRank(), size);
      std::memcpy(mine.data_ptr(), record.data(), record.size());
      std::vector<WorkRef> works{gather_into(*group_, all, mine)};
      return std::make_unique<HostRecords>(std::move(works), all, ranks());
    }
    // Memory that the first record of a load got serves the others, which are smaller: a rank that has run out of
    // device memory can still say so. There is one gather at a time.
    WorkRef work;
    device_->on_collective_stream([&] {
      if (!records_on_device_.defined() || records_on_device_.numel() < total) {
        records_on_device_ = at::empty({total}, at::TensorOptions().dtype(at::kByte).device(type_));
        records_on_host_ = pinned_bytes(type_, static_cast<uint64_t>(total));
      }
      const at::Tensor on_host = records_on_host_.narrow(0, 0, total);
      const at::Tensor on_device = records_on_device_.narrow(0, 0, total);
      // The others' places become zeros: where a communicator is aborted and its process lives on, the gather ends
      // early, and what the last one has left there would be believed.
      auto* const records = static_cast<char*>(on_host.data_ptr());
      std::memset(records, 0, static_cast<size_t>(total));
      std::memcpy(records + size * group_->getRank(), record.data(), record.size());
      on_device.copy_(on_host, /*non_blocking=*/true);
      work = gather_into(*group_, on_device, on_device.narrow(0, size * group_->getRank(), size));
    });
    return std::make_unique<DeviceRecords>(std::move(work), records_on_device_.narrow(0, 0, total),
                                           records_on_host_.narrow(0, 0, total), device_, ranks());
  } catch (...) {
    rethrow_as_ours();
  }

  std::unique_ptr<Pending> broadcast(const Payload& payload, uint32_t root) override {
    return issue(payload, [&](const at::Tensor& bytes) { return std::vector<WorkRef>{broadcast_of(bytes, root)}; });
  }

  std::unique_ptr<Pending> all_gather(const Payload& payload) override {
    return issue(payload, [&](at::Tensor bytes) {
      const int64_t stripe = bytes.numel() / group_->getSize();
      std::vector<WorkRef> works;
      if (stripes_by_broadcast_) {
        for (int r = 0; r < group_->getSize(); ++r)
          works.push_back(broadcast_of(bytes.narrow(0, stripe * r, stripe), static_cast<uint32_t>(r)));
      } else {
        at::Tensor mine = bytes.narrow(0, stripe * group_->getRank(), stripe);
        works.push_back(gather_into(*group_, bytes, mine));
      }
      return works;
    });
  }

 private:
  WorkRef broadcast_of(const at::Tensor& bytes, uint32_t root) {
    c10d::BroadcastOptions options;
    options.rootRank = root;
    std::vector<at::Tensor> tensors{bytes};
    return group_->broadcast(tensors, options);
  }

  std::unique_ptr<Pending> issue(const Payload& payload,
                                 const std::function<std::vector<WorkRef>(const at::Tensor&)>& start) try {
    const PlainTorch plain;
    if (payload.device) {
      std::vector<WorkRef> works;
      device_->behind_copies(*payload.device);
      device_->on_collective_stream(
          [&] { works = start(block_bytes(*payload.device).narrow(0, 0, static_cast<int64_t>(payload.bytes))); });
      return std::make_unique<BlockPending>(std::move(works), device_, payload.device);
    }
    // The works hold the tensor, and it the memory, for as long as the backend may touch it.
    const at::Tensor bytes = at::from_blob(
        payload.host->data(), {static_cast<int64_t>(payload.bytes)}, [memory = payload.host](void*) {},
        at::TensorOptions().dtype(at::kByte));
    return std::make_unique<HostPending>(start(bytes));
  } catch (...) {
    rethrow_as_ours();
  }

  const c10::intrusive_ptr<c10d::ProcessGroup> group_;
  const c10::Device type_;
  const std::shared_ptr<Device> device_;  // null for host memory
  bool cpu_records_ = false;
  bool stripes_by_broadcast_ = false;
  at::Tensor records_on_device_, records_on_host_;
};

}  // namespace

std::unique_ptr<Collective> make_collective(c10::intrusive_ptr<c10d::ProcessGroup> group, c10::Device type,
                                            std::shared_ptr<Device> device) {
  return std::make_unique<ProcessGroupCollective>(std::move(group), type, std::move(device));
}

}  // namespace weightload
