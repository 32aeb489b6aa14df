#include "bindings/gil.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <iterator>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/coarse_clock.h"
#include "base/fork_generation.h"
#include "base/start_thread.h"
#include "bindings/register.h"
#include "group/registry.h"

namespace py = pybind11;

namespace weightload {
namespace {

// How long the exit waits for threads in the core. They come back within a second, but for one that the kernel holds (a
// network disk that does not answer).
constexpr std::chrono::seconds kPatience{10};

// A thread that was in the core so lately may be about to come again, or let go of tensors.
constexpr std::chrono::milliseconds kLately{500};

// How often the exit looks whether such threads have ended.
constexpr std::chrono::milliseconds kLook{5};

// Guarded by the GIL, but for what is atomic. In a forked child the other threads are gone, wherever they were: it has
// no more threads in the core than it will count itself, and no loads but its own. Those of the parent have no threads
// here, and one that a thread was in keeps its mutex for ever.
struct State {
  std::atomic<bool> ending{false};
  std::atomic<bool> abandoned{false};  // the interpreter goes although threads are in the core
  bool awaited = true;                 // the exit hook still waits for who is inside; guarded by the mutex
  std::atomic<int> inside{0};
  std::thread::id hook;  // the thread that is in leave_interpreter()
  PyObject* error = nullptr;
  std::vector<std::weak_ptr<LiveLoad>> live;
  struct Left {
    std::shared_ptr<LiveLoad> load;
    py::object files, object;
  };
  std::vector<Left> to_close;  // of close_later()
  size_t next_purge = 64;
  // By thread: when it was last in the core.
  std::unordered_map<unsigned long, std::chrono::steady_clock::time_point> visits;
  uint32_t generation = fork_generation();

  std::mutex mutex;
  std::condition_variable left;  // `inside` has become smaller while the interpreter was ending
};

// Never destroyed: threads may come late. A forked child starts with a new one, since the mutex may be held for ever.
State& state() {
  static State* current = new State;
  if (current->generation != fork_generation()) {
    auto* const fresh = new State;
    fresh->ending = current->ending.load();
    fresh->awaited = current->awaited;
    fresh->error = current->error;
    current = fresh;
  }
  return *current;
}

// With the GIL held.
void note_visit(State& all) {
  const auto now = coarse_now();
  if (all.visits.size() >= 256) {
    for (auto it = all.visits.begin(); it != all.visits.end();)
      it = now - it->second > kLately ? all.visits.erase(it) : std::next(it);
  }
  all.visits[PyThread_get_thread_ident()] = now;
}

// Whether a thread that has been in the core lately is still one of Python's. With the GIL held.
bool visitors_live(const State& all) {
  const auto now = coarse_now();
  const unsigned long here = PyThread_get_thread_ident();
  for (PyThreadState* one = PyInterpreterState_ThreadHead(PyInterpreterState_Get()); one;
       one = PyThreadState_Next(one)) {
    const auto visit = all.visits.find(one->thread_id);
    if (one->thread_id != here && visit != all.visits.end() && now - visit->second < kLately) return true;
  }
  return false;
}

// Note [Tensors of daemon threads]
// Torch lets go of the GIL to free a tensor, and asks for it again in a destructor: a daemon thread that loads in a
// loop would meet the interpreter's end there, of safetensors' tensors as of ours. It is refused its next load, and
// ends; so it is given the time for that, kLately at most.
void linger(State& all) {
  while (visitors_live(all)) {
    PyThreadState* const thread = PyEval_SaveThread();
    {
      std::unique_lock<std::mutex> lock(all.mutex);
      all.left.wait_for(lock, kLook);
    }
    PyEval_RestoreThread(thread);
  }
}

// Asking for the GIL would then abort the process. As Python does itself from 3.14 on.
void pause_if_abandoned() {
  State& all = state();
  while (all.abandoned.load() && all.hook != std::this_thread::get_id()) ::pause();
}

// What Python knows of a thread of the core, from the first time that it takes the GIL to its end. Anew each time, it
// would be memory that is mapped and unmapped while page faults of all threads wait, and others for the GIL: checked
// loads into fresh memory took 1.7 times as long.
class ThreadState {
 public:
  ThreadState() {
    static_cast<void>(PyGILState_Ensure());  // and is never released: what others ensure from now on leaves it alone
    state_ = PyEval_SaveThread();
  }
  ~ThreadState() {
    if (interpreter_is_ending()) return;  // Python does it
    PyEval_RestoreThread(state_);
    PyThreadState_Clear(state_);
    PyThreadState_DeleteCurrent();
  }
  ThreadState(const ThreadState&) = delete;
  ThreadState& operator=(const ThreadState&) = delete;

 private:
  PyThreadState* state_;
};

void keep_thread_state() { static thread_local const ThreadState state; }

void close_all(const std::vector<std::weak_ptr<LiveLoad>>& loads) {
  for (const auto& one : loads) {
    if (const auto load = one.lock()) load->close();
  }
}

}  // namespace

bool interpreter_is_ending() noexcept { return state().ending.load(std::memory_order_relaxed); }

void fail_at_exit() {
  PyErr_SetString(state().error,
                  "the interpreter is exiting: no load begins any more, and one that was under way is cut off");
  throw py::error_already_set();
}

// Written with the GIL held only: what is dear about atomics is not needed, at every tensor.
static void add(std::atomic<int>& count, int number) {
  count.store(count.load(std::memory_order_relaxed) + number, std::memory_order_relaxed);
}

Inside::Inside(AtExit at_exit) : count_(state().inside) {
  State& all = state();
  if (at_exit == AtExit::raise && all.ending.load(std::memory_order_relaxed) && all.hook != std::this_thread::get_id())
    fail_at_exit();
  add(count_, 1);
}

Inside::~Inside() {
  add(count_, -1);
  State& all = state();
  if (!all.ending.load(std::memory_order_relaxed)) return;
  std::lock_guard<std::mutex> lock(all.mutex);
  all.left.notify_all();
}

ReleaseGil::ReleaseGil(AtExit at_exit) : inside_(at_exit) {
  bool keeps = false;
  if (interpreter_is_ending() && state().hook != std::this_thread::get_id()) {
    // inside_ has been counted: the hook has seen that, or has stopped looking.
    const std::lock_guard<std::mutex> lock(state().mutex);
    keeps = !state().awaited;
  }
  if (at_exit == AtExit::raise) note_visit(state());
  thread_ = keeps ? nullptr : PyEval_SaveThread();
}

ReleaseGil::~ReleaseGil() {
  if (!thread_) return;
  pause_if_abandoned();
  PyEval_RestoreThread(thread_);
}

AcquireGil::AcquireGil() {
  pause_if_abandoned();
  if (thread_of_the_core().is_set()) keep_thread_state();
  acquire_.emplace();
}

GiveGilBack::~GiveGilBack() {
  pause_if_abandoned();
  PyEval_RestoreThread(thread_);
}

ObjectOfAnyThread::~ObjectOfAnyThread() {
  if (interpreter_is_ending()) {
    static_cast<void>(object_.release());
    return;
  }
  const AcquireGil acquire;
  object_ = {};
}

// Refused where too many calls are pending: somebody else comes.
static void have_it_closed() {
  static_cast<void>(Py_AddPendingCall(
      [](void*) {
        try {
          close_what_was_left();
        } catch (py::error_already_set& error) {
          error.restore();
          return -1;
        }
        return 0;
      },
      nullptr));
}

void close_later(std::shared_ptr<LiveLoad> load, py::object files) {
  load->interrupt();
  state().to_close.push_back({std::move(load), std::move(files), {}});
  have_it_closed();
}

// Of something of Python's that has a close().
static void close_object_later(py::object object) {
  state().to_close.push_back({{}, {}, std::move(object)});
  have_it_closed();
}

void close_what_was_left() {
  State& all = state();
  if (all.to_close.empty() || thread_of_loads().is_set()) return;
  std::vector<State::Left> left;
  left.swap(all.to_close);
  {
    const ReleaseGil release(AtExit::go_on);
    for (State::Left& one : left) {
      if (one.load) one.load->close();
      one.load = {};
    }
  }
  while (!left.empty()) {
    const py::object object = std::exchange(left.back().object, {});
    left.pop_back();
    if (!object) continue;
    try {
      object.attr("close")();
    } catch (py::error_already_set&) {
      for (State::Left& one : left) all.to_close.push_back(std::move(one));
      throw;
    }
  }
}

void close_at_exit(const std::shared_ptr<LiveLoad>& load) {
  auto& live = state().live;
  if (live.size() >= state().next_purge) {
    live.erase(std::remove_if(live.begin(), live.end(), [](const auto& one) { return one.expired(); }), live.end());
    state().next_purge = 64 + 2 * live.size();
  }
  live.push_back(load);
}

void leave_interpreter() {
  State& all = state();
  all.hook = std::this_thread::get_id();
  all.error = py::object(py::module_::import("weightload.errors").attr("WeightLoadError")).release().ptr();
  all.ending = true;
  std::vector<std::weak_ptr<LiveLoad>> live = all.live;
  for (const auto& one : live) {
    if (const auto load = one.lock()) load->interrupt();
  }
  std::vector<State::Left> left;  // until the GIL is there again
  PyThreadState* thread = PyEval_SaveThread();
  const auto nobody_is_inside = [&] { return all.inside.load() == 0; };
  bool all_left = false;
  {
    std::unique_lock<std::mutex> lock(all.mutex);
    all_left = all.left.wait_for(lock, kPatience, nobody_is_inside);
  }
  if (all_left) {
    // What was being made is there by now. While it is closed others still let go of the GIL, which its threads want.
    PyEval_RestoreThread(thread);
    live = all.live;
    left.swap(all.to_close);  // those are among them
    thread = PyEval_SaveThread();
    close_all(live);
  }
  {
    std::unique_lock<std::mutex> lock(all.mutex);
    all.abandoned = !all_left || !all.left.wait_for(lock, kPatience, nobody_is_inside);
    all.awaited = false;
  }
  group_registry::abandon();  // what closing has left to be said to other ranks
  PyEval_RestoreThread(thread);
  linger(all);
  all.hook = {};  // nothing begins in this thread either
}

void register_gil(py::module_& module) {
  module.def("leave_interpreter", &leave_interpreter,
             "The exit hook: from now on no load begins, and those that are under way are stopped and joined.");
  module.def("is_exiting", &interpreter_is_ending, "Whether the exit hook has begun.");
  module.def(
      "enter_thread_of_loads", [] { thread_of_loads().set(); },
      "This thread is one that loads wait for: what is closed in it is closed later, by another.");
  module.def("in_thread_of_loads", [] { return thread_of_loads().is_set(); }, "Whether this thread is one of those.");
  module.def("close_later", &close_object_later, py::arg("object"), "Has another thread call close() of an object.");
}

}  // namespace weightload
