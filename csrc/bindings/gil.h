#pragma once
#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

namespace weightload {

// Note [The interpreter's exit]
// Daemon threads outlive the interpreter. In the moment in which one of them asks for the GIL after that, Python up to
// 3.13 unwinds it, through whatever C++ it is in: a destructor that asks (the end of a gil_scoped_release) must not
// throw, so the process aborts. Therefore no thread may be in the core when the interpreter goes. Every call that lets
// go of the GIL, or runs Python code, is counted (Inside); leave_interpreter(), the exit hook, lets nothing begin from
// then on, stops the loads, and waits until the count is 0. What was cut off raises, and a call that comes later does
// so at once: by no Python code, in which a thread could lose the GIL as well.

// Whether the exit hook has begun.
bool interpreter_is_ending() noexcept;

// Raises what a call raises from then on: a WeightLoadError.
[[noreturn]] void fail_at_exit();

// What becomes of a call that comes when the interpreter is ending.
enum class AtExit : uint8_t {
  raise,  // fail_at_exit()
  go_on,  // for destructors
};

// This thread is in a call of the core. With the GIL held.
class Inside {
 public:
  explicit Inside(AtExit at_exit = AtExit::raise);
  ~Inside();
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  std::atomic<int>& count_;  // where it was counted: Python code in a call may fork, and the child counts anew
};

// Lets go of the GIL until its end; in place of pybind11's, everywhere. Calls that go on when the exit hook has stopped
// waiting for them keep it, in any thread but the hook's: before that they must not, as what they join may want it.
class ReleaseGil {
 public:
  explicit ReleaseGil(AtExit at_exit = AtExit::raise);
  ~ReleaseGil();
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  const Inside inside_;
  PyThreadState* thread_;  // null where it is kept
};

class LiveLoad;

// Takes the GIL until its end, in a thread of the core that has something to ask of Python: in place of pybind11's.
// Such threads are not counted; the exit hook joins them with their loads. One that comes when the hook has given up
// waiting is held here: Python would end it, or the process.
class AcquireGil {
 public:
  AcquireGil();

 private:
  std::optional<pybind11::gil_scoped_acquire> acquire_;
};

// Lets go of what AcquireGil has taken, until its end.
class GiveGilBack {
 public:
  GiveGilBack() : thread_(PyEval_SaveThread()) {}
  ~GiveGilBack();
  GiveGilBack(const GiveGilBack&) = delete;
  GiveGilBack& operator=(const GiveGilBack&) = delete;

 private:
  PyThreadState* thread_;
};

// An object of Python's that is let go of by whatever thread does so last. After the interpreter's exit hook nothing of
// Python's is freed any more.
class ObjectOfAnyThread {
 public:
  explicit ObjectOfAnyThread(pybind11::object object) : object_(std::move(object)) {}
  ~ObjectOfAnyThread();
  ObjectOfAnyThread(const ObjectOfAnyThread&) = delete;
  ObjectOfAnyThread& operator=(const ObjectOfAnyThread&) = delete;

  // With the GIL held.
  const pybind11::object& get() const { return object_; }

 private:
  pybind11::object object_;
};

// Note [Finalisers in threads of loads]
// Where a thread that a load waits for runs Python code, the garbage collector may run in it, too, and let go of any
// load: of the one whose tasks the thread is at, or while it holds a lock that others want. It must not wait for
// itself, nor for another thread. So what such a thread closes is only stopped there. close_later() keeps it, and
// another thread closes it: the main one between two bytecodes, or whichever makes a load next, or the exit hook.
// Such threads are the core's, the one that speaks to servers, and those that hash (they call enter_thread_of_loads).

// `files`: what the load reads from. With the GIL held.
void close_later(std::shared_ptr<LiveLoad> load, pybind11::object files);

// Closes what close_later() has kept. With the GIL held; does nothing in a thread of loads. Throws what close() of an
// object of Python's raises: what a signal's handler has raised in it.
void close_what_was_left();

// A load that the exit hook stops.
class LiveLoad {
 public:
  virtual ~LiveLoad() = default;
  virtual void interrupt() noexcept = 0;  // returns at once
  virtual void close() noexcept = 0;      // joins the threads; without the GIL
};

// Until the object is gone. With the GIL held.
void close_at_exit(const std::shared_ptr<LiveLoad>& load);

// The exit hook: see Note [The interpreter's exit]. Stops and joins everything that has threads.
void leave_interpreter();

}  // namespace weightload
