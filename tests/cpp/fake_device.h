// A device of plain memory and one thread, for the pipeline without torch: copies happen late, on that thread.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "base/error.h"
#include "device/device.h"

class FakeDevice final : public weightload::Device {
 public:
  struct Block final : weightload::DeviceBlock {
    explicit Block(uint64_t size) : bytes(size, '\xCD') {}
    std::vector<char> bytes;
    uint64_t copied = 0;  // the queue position behind its last copy
    std::atomic<bool> abandoned{false};
  };

  FakeDevice() : thread_([this] { run(); }) {}
  ~FakeDevice() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  std::unique_ptr<weightload::HostSlot> allocate_slot(size_t bytes, bool pinned) override {
    if (pinned && pinned_left.fetch_sub(1) <= 0) return nullptr;
    if (!pinned && no_pageable) return nullptr;
    return std::make_unique<Slot>(this, bytes, pinned);
  }
  weightload::DeviceBlockRef allocate_block(uint64_t bytes) override {
    if (bytes > 0 && blocks_left.fetch_sub(1) <= 0)
      throw weightload::Error(weightload::ErrorKind::device_memory, "the fake device is full");
    auto block = std::make_shared<Block>(bytes);
    ++blocks_made;
    std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back(block);  // until the queue has passed: what the stream-ordered allocators do
    return block;
  }
  void copy(weightload::HostSlot& slot, uint64_t slot_offset, weightload::DeviceBlock& block, uint64_t block_offset,
            uint64_t bytes) override {
    const char* from = slot.data() + slot_offset;
    char* to = static_cast<Block&>(block).bytes.data() + block_offset;
    ++copies;
    enqueue([from, to, bytes] { std::memcpy(to, from, bytes); });
  }
  void mark_slot(weightload::HostSlot& slot) override {
    static_cast<Slot&>(slot).copied = enqueue([] {});
  }
  void mark_block(weightload::DeviceBlock& block) override {
    static_cast<Block&>(block).copied = enqueue([] {});
  }
  void await_block(weightload::DeviceBlock& block) override { wait(static_cast<Block&>(block).copied); }
  void await_all() override {
    wait(enqueue([] {}));
  }
  void behind_copies(weightload::DeviceBlock& block) override { wait(static_cast<Block&>(block).copied); }
  void on_collective_stream(const std::function<void()>& issue) override { issue(); }
  void mark_shared(weightload::DeviceBlock& block) override {
    static_cast<Block&>(block).copied = enqueue([] {});
  }
  void abandon(weightload::DeviceBlock& block) noexcept override { static_cast<Block&>(block).abandoned = true; }

  // Nothing that is queued later runs before what is given back is called.
  std::function<void()> hold() {
    auto gate = std::make_shared<std::promise<void>>();
    enqueue([open = gate->get_future().share()] { open.wait(); });
    return [gate] { gate->set_value(); };
  }

  std::atomic<int> pinned_left{1 << 30};
  std::atomic<int> blocks_left{1 << 30};
  std::atomic<int> blocks_made{0};
  std::atomic<bool> no_pageable{false};
  std::atomic<int> copies{0};
  std::atomic<bool> fails{false};  // whoever asks for a slot is told so
  std::atomic<int> slots_alive{0};
  std::atomic<size_t> shift{0};  // slots begin so many bytes behind a page

 private:
  struct Slot final : weightload::HostSlot {
    Slot(FakeDevice* device, size_t bytes, bool is_pinned) : device(device) {
      // Of exactly this size, so that the address sanitizer sees the end.
      if (::posix_memalign(&memory, 4096, bytes + device->shift) != 0) throw std::bad_alloc();
      data_ = static_cast<char*>(memory) + device->shift;
      size_ = bytes;
      pinned_ = is_pinned;
      ++device->slots_alive;
    }
    ~Slot() override {
      device->wait(copied);
      std::free(memory);
      --device->slots_alive;
    }
    bool copies_done() override {
      if (device->fails) throw weightload::Error(weightload::ErrorKind::device_memory, "the fake device has failed");
      return device->passed(copied);
    }
    FakeDevice* device;
    void* memory = nullptr;
    uint64_t copied = 0;
  };

  uint64_t enqueue(std::function<void()> operation) {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(operation));
    changed_.notify_all();
    return ++queued_;
  }
  bool passed(uint64_t position) {
    std::lock_guard<std::mutex> lock(mutex_);
    return done_ >= position;
  }
  void wait(uint64_t position) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return done_ >= position; });
  }
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      auto operation = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      std::this_thread::yield();
      operation();
      lock.lock();
      ++done_;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  std::vector<weightload::DeviceBlockRef> kept_;
  uint64_t queued_ = 0, done_ = 0;
  bool stopping_ = false;
  std::thread thread_;
};
