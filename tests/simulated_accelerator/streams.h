#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace simulated {

// A point in a stream's work that others can wait for.
class Moment {
 public:
  void reach();
  bool reached() const;
  void wait() const;

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool reached_ = false;
};
using MomentRef = std::shared_ptr<Moment>;

// A queue of operations and the thread that runs them in order, each after a random delay: as late as a busy device,
// and out of step with every other stream.
class Stream {
 public:
  explicit Stream(uint64_t number);
  ~Stream();  // runs what is queued, then joins

  void enqueue(std::function<void()> operation);
  MomentRef mark();                 // reached when everything queued so far has run
  void wait_for(MomentRef moment);  // what is queued from now on runs after it
  bool idle();

 private:
  void run();
  std::chrono::microseconds next_delay();

  std::mt19937_64 random_;  // the worker's
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  uint64_t seed_generation_ = 0;
  const uint64_t number_;
  bool running_ = false;
  bool stopping_ = false;
  std::thread worker_;
};

constexpr int kDevices = 2;
constexpr int kStreams = 5;  // a device's: the default stream, and a pool of four

Stream& stream(int device, int64_t id);  // made on first use
int64_t open_stream(int device);         // one more, for a communicator; its id, from kStreams
void close_stream(int device, int64_t id);
std::vector<int64_t> opened_streams(int device);
void synchronize(int device);  // all streams of the device
void stop_streams();           // for the interpreter's exit

// The delays that follow come from this seed. `longest` microseconds: most are below a tenth of it.
void seed_delays(uint64_t seed, uint64_t longest);

// Throws in a forked child, as drivers do: the streams' threads are in the parent.
void require_same_process();
bool in_forked_child();

}  // namespace simulated
