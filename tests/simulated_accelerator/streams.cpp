#include "streams.h"

#include <pthread.h>

#include <atomic>
#include <stdexcept>
#include <utility>

namespace simulated {
namespace {

std::atomic<uint64_t> seed{0};
std::atomic<uint64_t> seed_generation{1};
std::atomic<uint64_t> longest_delay{300};
std::atomic<bool> forked{false};

std::mutex streams_mutex;
std::unique_ptr<Stream> streams[kDevices][kStreams];
std::vector<std::unique_ptr<Stream>> opened[kDevices];
uint64_t opened_ever = 0;

// Every place a stream of the device may be at. Call with streams_mutex held.
std::vector<std::unique_ptr<Stream>*> places(int device) {
  std::vector<std::unique_ptr<Stream>*> found;
  for (auto& one : streams[device]) found.push_back(&one);
  for (auto& one : opened[device]) found.push_back(&one);
  return found;
}

}  // namespace

void Moment::reach() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    reached_ = true;
  }
  changed_.notify_all();
}

bool Moment::reached() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return reached_;
}

void Moment::wait() const {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return reached_; });
}

Stream::Stream(uint64_t number) : number_(number), worker_([this] { run(); }) {}

Stream::~Stream() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  worker_.join();
}

void Stream::enqueue(std::function<void()> operation) {
  require_same_process();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(operation));
  }
  changed_.notify_all();
}

MomentRef Stream::mark() {
  auto moment = std::make_shared<Moment>();
  enqueue([moment] { moment->reach(); });
  return moment;
}

void Stream::wait_for(MomentRef moment) {
  enqueue([moment = std::move(moment)] { moment->wait(); });
}

bool Stream::idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return queue_.empty() && !running_;
}

std::chrono::microseconds Stream::next_delay() {
  const uint64_t generation = seed_generation.load();
  if (generation != seed_generation_) {
    seed_generation_ = generation;
    random_.seed(seed.load() * 1000 + number_);
  }
  const uint64_t longest = longest_delay.load();
  if (longest == 0) return std::chrono::microseconds(0);
  // One in eight is long, a quarter of the rest none at all.
  const uint64_t kind = random_() % 8;
  if (kind == 0) return std::chrono::microseconds(random_() % longest);
  return std::chrono::microseconds(kind < 3 ? 0 : random_() % (longest / 10 + 1));
}

void Stream::run() {
  ::pthread_setname_np(::pthread_self(), "simulated");
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    auto operation = std::move(queue_.front());
    queue_.pop_front();
    running_ = true;
    lock.unlock();
    if (const auto delay = next_delay(); delay.count() > 0) std::this_thread::sleep_for(delay);
    operation();
    operation = nullptr;
    lock.lock();
    running_ = false;
  }
}

Stream& stream(int device, int64_t id) {
  std::lock_guard<std::mutex> lock(streams_mutex);
  if (id >= kStreams) {
    auto& one = opened[device].at(static_cast<size_t>(id - kStreams));
    if (!one) throw std::runtime_error("a closed stream of the simulated accelerator");
    return *one;
  }
  auto& found = streams[device][id];
  if (!found) found = std::make_unique<Stream>(static_cast<uint64_t>(device) * kStreams + static_cast<uint64_t>(id));
  return *found;
}

int64_t open_stream(int device) {
  std::lock_guard<std::mutex> lock(streams_mutex);
  opened[device].push_back(std::make_unique<Stream>(kDevices * kStreams + opened_ever++));
  return kStreams + static_cast<int64_t>(opened[device].size()) - 1;
}

void close_stream(int device, int64_t id) {
  std::unique_ptr<Stream> closed;
  {
    std::lock_guard<std::mutex> lock(streams_mutex);
    closed = std::move(opened[device].at(static_cast<size_t>(id - kStreams)));
  }
  if (forked) static_cast<void>(closed.release());  // its thread is in the parent
}

std::vector<int64_t> opened_streams(int device) {
  std::lock_guard<std::mutex> lock(streams_mutex);
  std::vector<int64_t> found;
  for (size_t i = 0; i < opened[device].size(); ++i)
    if (opened[device][i]) found.push_back(kStreams + static_cast<int64_t>(i));
  return found;
}

void synchronize(int device) {
  std::vector<MomentRef> marks;
  {
    std::lock_guard<std::mutex> lock(streams_mutex);
    for (const auto* one : places(device))
      if (*one) marks.push_back((*one)->mark());
  }
  for (const MomentRef& mark : marks) mark->wait();
}

void stop_streams() {
  if (forked) return;
  for (int device = 0; device < kDevices; ++device) synchronize(device);
  for (int device = 0; device < kDevices; ++device)
    for (auto* one : places(device)) one->reset();
}

void seed_delays(uint64_t new_seed, uint64_t longest) {
  static const int registered = ::pthread_atfork(nullptr, nullptr, [] { forked = true; });
  static_cast<void>(registered);
  seed = new_seed;
  longest_delay = longest;
  ++seed_generation;
}

bool in_forked_child() { return forked; }

void require_same_process() {
  if (forked) throw std::runtime_error("the simulated accelerator cannot be used in a forked child");
}

}  // namespace simulated
