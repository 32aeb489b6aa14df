#pragma once
#include <pybind11/pybind11.h>

#include <condition_variable>
#include <cstdint>
#include <list>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/fork_generation.h"

namespace weightload {

// Tensors of a load, each of which is handed out once, by name or in the order in which they come. Threads may share
// it: one at a time asks the load for more, the others wait until something has come.
//
// Everything is guarded by the GIL, and in C++ for that reason: in Python a signal handler may raise between any two
// lines, of which one sets a flag and the other makes its end certain.
class Prefetch {
 public:
  // `weights`: the load's iterator. `current_stream`: the consumer's current stream of the device; None on the CPU.
  Prefetch(pybind11::object weights, const std::vector<std::string>& names, pybind11::object current_stream);

  std::vector<std::string> names() const { return names_; }
  size_t size() const { return names_.size(); }

  // Waits for a tensor and hands it out. Signal handlers get their turn.
  pybind11::object take(const pybind11::str& name);

  // What has come and was not taken, as (name, tensor), the longest there first; waits for more. Raises StopIteration.
  pybind11::object next();

  void close();

  // For the garbage collector: an error holds the frames that it went through, and one of these may hold this.
  int traverse(visitproc visit, void* argument) const;
  void clear();

 private:
  struct Tensor {
    std::string name;
    pybind11::object tensor;
    pybind11::object ready_on;  // the stream that may use it
  };
  enum class State : uint8_t { awaited, here, taken };
  class Pulling;

  void require_process() const;
  bool ended() const { return closed_ || taken_ == names_.size(); }
  void pull();
  void await_change();
  void tell_of_change();
  bool make_ready(const Tensor& here);
  pybind11::object hand_out(std::list<Tensor>::iterator here);

  pybind11::object weights_, current_stream_;
  pybind11::object error_;    // of the load: for every tensor that had not come by then
  bool interrupted_ = false;  // ended by what belonged to one caller, as Ctrl-C: others get an error of usage
  const std::vector<std::string> names_;
  std::unordered_map<std::string, State> states_;
  std::list<Tensor> here_;
  size_t taken_ = 0;
  bool closed_ = false;
  bool pulling_ = false;  // a thread asks the load, without the GIL
  std::thread::id puller_;
  const uint32_t generation_ = fork_generation();

  std::mutex mutex_;  // taken for a moment only, with or without the GIL
  std::condition_variable changed_;
  uint64_t changes_ = 0;  // guarded by mutex_
};

}  // namespace weightload
