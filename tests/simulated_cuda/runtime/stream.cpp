#include "stream.h"

#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>

#include "device.h"

namespace simulated {
namespace {

uint64_t from_environment(const char* name, uint64_t otherwise) {
  const char* const text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::stoull(text) : otherwise;
}

std::atomic<uint64_t> seed{from_environment("WEIGHTLOAD_SIMULATED_SEED", 0)};
std::atomic<uint64_t> longest{from_environment("WEIGHTLOAD_SIMULATED_DELAY_US", 300)};
std::atomic<uint64_t> generation{1};
std::atomic<uint64_t> opened{0};
std::atomic<bool> is_forked{false};

// Never destroyed: streams may run on while the process ends.
struct World {
  std::mutex order;
  std::vector<std::string> names;
  Checker checker{[this](size_t stream) { return names.at(stream); }};
  Clock host;
  std::mutex table;
  std::map<cudaStream_t, StreamRef> streams;
  StreamRef legacy[8];
};

World& world() {
  static World* const one = [] {
    ::pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
    return new World;
  }();
  return *one;
}

// NCCL's watchdog in torch looks at every event, and tells nobody in time: what it saw orders nothing.
bool orders_nothing() {
  char name[16] = "";
  ::prctl(PR_GET_NAME, name);
  return std::strncmp(name, "pt_nccl", 7) == 0;
}

}  // namespace

void Moment::reach() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    reached_ = true;
    time_ = std::chrono::steady_clock::now();
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

std::chrono::steady_clock::time_point Moment::time() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return time_;
}

Stream::Stream(int on, unsigned with, int of_priority) : device(on), flags(with), priority(of_priority), id(++opened) {}

std::string Stream::name() const { return "stream " + std::to_string(id) + " of device " + std::to_string(device); }

size_t Stream::number() {
  if (number_ == SIZE_MAX) {
    number_ = world().names.size();
    world().names.push_back(name());
  }
  return number_;
}

bool Stream::idle() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return queue_.empty() && !running_;
}

void Stream::push(std::function<void()> operation) {
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back(std::move(operation));
  changed_.notify_all();
  if (started_) return;
  started_ = true;
  // Signals are for the program's own threads.
  sigset_t all, before;
  sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread([this] { run(); }).detach();  // the process ends without waiting for its device, as with a real one
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Stream::retire() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    retired_ = true;
  }
  changed_.notify_all();
}

void Stream::pause() {
  if (const uint64_t now = generation.load(); now != seeded_) {
    seeded_ = now;
    random_.seed(seed.load() * 1000 + id);
  }
  const uint64_t most = longest.load();
  if (most == 0) return;
  // One in eight is long, a quarter of the rest none at all.
  const uint64_t kind = random_() % 8;
  const uint64_t us = kind == 0 ? random_() % most : kind < 3 ? 0 : random_() % (most / 10 + 1);
  if (us > 0) std::this_thread::sleep_for(std::chrono::microseconds(us));
}

void Stream::run() {
  ::pthread_setname_np(::pthread_self(), "sim-stream");
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return retired_ || !queue_.empty(); });
    if (queue_.empty()) return;
    auto operation = std::move(queue_.front());
    queue_.pop_front();
    running_ = true;
    lock.unlock();
    pause();
    operation();
    operation = nullptr;
    lock.lock();
    running_ = false;
  }
}

std::mutex& order_lock() { return world().order; }
Checker& checker() { return world().checker; }
Clock& host_clock() { return world().host; }

cudaStream_t open_stream(int device, unsigned flags, int priority) {
  auto made = std::make_shared<Stream>(device, flags, priority);
  const auto handle = reinterpret_cast<cudaStream_t>(made.get());
  std::lock_guard<std::mutex> lock(world().table);
  world().streams[handle] = std::move(made);
  return handle;
}

StreamRef legacy_stream(int device) {
  std::lock_guard<std::mutex> lock(world().table);
  StreamRef& legacy = world().legacy[device];
  if (!legacy) {
    legacy = std::make_shared<Stream>(device, 0u, 0);
    world().streams[reinterpret_cast<cudaStream_t>(legacy.get())] = legacy;
  }
  return legacy;
}

StreamRef find_stream(cudaStream_t handle) {
  // A thread's own default stream is not told from the legacy one.
  if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread) {
    return legacy_stream(current_device());
  }
  std::lock_guard<std::mutex> lock(world().table);
  const auto found = world().streams.find(handle);
  return found == world().streams.end() ? nullptr : found->second;
}

bool close_stream(cudaStream_t handle) {
  static auto* const closed = new std::vector<StreamRef>;  // their threads may still run
  std::lock_guard<std::mutex> lock(world().table);
  const auto found = world().streams.find(handle);
  if (found == world().streams.end()) return false;
  found->second->retire();
  closed->push_back(found->second);
  world().streams.erase(found);
  return true;
}

std::vector<StreamRef> streams_of(int device) {
  std::lock_guard<std::mutex> lock(world().table);
  std::vector<StreamRef> found;
  for (const auto& [handle, stream] : world().streams)
    if (stream->device == device) found.push_back(stream);
  return found;
}

namespace {

// With the order lock held.
MomentRef mark_locked(Stream& stream) {
  stream.clock.tick(stream.number());
  auto moment = std::make_shared<Moment>(stream.clock);
  stream.push([moment] { moment->reach(); });
  return moment;
}

void wait_locked(Stream& stream, const MomentRef& moment) {
  stream.clock.join(moment->clock());
  stream.push([moment] { moment->wait(); });
}

// The legacy stream runs by itself: after what other streams have so far, unless they were made not to wait, and
// before what they get later.
void order_legacy(const StreamRef& stream, const std::vector<StreamRef>& others, const StreamRef& legacy) {
  if (stream != legacy) {
    if (!(stream->flags & cudaStreamNonBlocking) && !legacy->idle()) wait_locked(*stream, mark_locked(*legacy));
    if (!(stream->flags & cudaStreamNonBlocking)) stream->clock.join(legacy->clock);
    return;
  }
  for (const StreamRef& other : others) {
    if (other == legacy || other->flags & cudaStreamNonBlocking) continue;
    if (!other->idle()) wait_locked(*legacy, mark_locked(*other));
    legacy->clock.join(other->clock);
  }
}

}  // namespace

void enqueue(const StreamRef& stream, const char* what, const std::vector<Access>& accesses, std::function<void()> run,
             const Clock* before, Clock* after) {
  const auto others = streams_of(stream->device);
  const StreamRef legacy = legacy_stream(stream->device);
  std::lock_guard<std::mutex> lock(order_lock());
  order_legacy(stream, others, legacy);
  stream->clock.join(host_clock());
  if (before != nullptr) stream->clock.join(*before);
  const size_t number = stream->number();
  const Step step{what, number, stream->clock.tick(number)};
  for (const Access& access : accesses) checker().access(access, step, stream->clock);
  if (after != nullptr) *after = stream->clock;
  stream->push(std::move(run));
}

MomentRef mark(const StreamRef& stream) {
  const auto others = streams_of(stream->device);
  const StreamRef legacy = legacy_stream(stream->device);
  std::lock_guard<std::mutex> lock(order_lock());
  order_legacy(stream, others, legacy);
  stream->clock.join(host_clock());
  return mark_locked(*stream);
}

void wait_for(const StreamRef& stream, const MomentRef& moment) {
  std::lock_guard<std::mutex> lock(order_lock());
  wait_locked(*stream, moment);
}

void host_learns(const Clock& clock) {
  if (orders_nothing()) return;
  std::lock_guard<std::mutex> lock(order_lock());
  host_clock().join(clock);
}

void host_wait(const Moment& moment) {
  moment.wait();
  host_learns(moment.clock());
}

bool host_query(const Moment& moment) {
  if (!moment.reached()) return false;
  host_learns(moment.clock());
  return true;
}

void synchronize(const StreamRef& stream) { host_wait(*mark(stream)); }

void synchronize_device(int device) {
  std::vector<MomentRef> moments;
  for (const StreamRef& stream : streams_of(device)) moments.push_back(mark(stream));
  for (const MomentRef& moment : moments) host_wait(*moment);
}

void seed_delays(uint64_t new_seed, uint64_t longest_us) {
  seed = new_seed;
  longest = longest_us;
  ++generation;
}

std::function<void()> hold(const StreamRef& stream) {
  auto gate = std::make_shared<Moment>(Clock{});
  std::lock_guard<std::mutex> lock(order_lock());
  stream->push([gate] { gate->wait(); });
  return [gate] { gate->reach(); };
}

bool forked() { return is_forked.load(); }

}  // namespace simulated
