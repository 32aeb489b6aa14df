#include "bindings/prefetch.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "bindings/gil.h"
#include "bindings/register.h"
#include "bindings/signals.h"
#include "device/plain_torch.h"

namespace py = pybind11;

namespace weightload {
namespace {

constexpr const char* kClosed = "the prefetch loader is closed";

[[noreturn]] void fail(ErrorKind kind, const std::string& what) { throw Error(kind, what); }

// The same exception again, without the frames that it went through.
[[noreturn]] void raise_again(const py::object& error) {
  PyException_SetTraceback(error.ptr(), Py_None);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw py::error_already_set();
}

}  // namespace

// While a thread asks the load. Others are told when it has done so, however it ends.
class Prefetch::Pulling {
 public:
  explicit Pulling(Prefetch& prefetch) : prefetch_(prefetch) {
    prefetch_.pulling_ = true;
    prefetch_.puller_ = std::this_thread::get_id();
  }
  ~Pulling() {
    prefetch_.pulling_ = false;
    prefetch_.tell_of_change();
  }
  Pulling(const Pulling&) = delete;
  Pulling& operator=(const Pulling&) = delete;

 private:
  Prefetch& prefetch_;
};

Prefetch::Prefetch(py::object weights, const std::vector<std::string>& names, py::object current_stream)
    : weights_(std::move(weights)), current_stream_(std::move(current_stream)), names_(names) {
  for (const std::string& name : names_) states_.emplace(name, State::awaited);
}

// In a forked child another thread may hold the mutex for ever.
void Prefetch::require_process() const {
  if (generation_ != fork_generation())
    fail(ErrorKind::usage, "this prefetch was begun before fork(); its threads are in the parent process only");
}

py::object Prefetch::take(const py::str& asked) {
  const Inside inside;
  require_process();
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(asked.ptr(), &size);
  if (!text) throw py::error_already_set();
  const std::string name(text, static_cast<size_t>(size));
  while (true) {
    if (closed_) fail(ErrorKind::usage, kClosed);
    const auto state = states_.find(name);
    if (state == states_.end()) fail(ErrorKind::tensor, "tensor " + name + " is not in the prefetch plan");
    if (state->second == State::taken) fail(ErrorKind::tensor, "tensor " + name + " was taken before");
    if (state->second == State::awaited) {
      pull();
      continue;
    }
    const auto here = std::find_if(here_.begin(), here_.end(), [&](const Tensor& one) { return one.name == name; });
    if (make_ready(*here)) return hand_out(here);
  }
}

py::object Prefetch::next() {
  const Inside inside;
  while (true) {
    require_process();
    if (ended()) throw py::stop_iteration();
    if (here_.empty()) {
      pull();
      continue;
    }
    const auto here = here_.begin();
    if (!make_ready(*here)) continue;
    // Before anything of it is taken: making them may fail, or run a finaliser.
    py::str name(here->name);
    if (here_.empty() || here_.begin() != here) continue;
    PyObject* const both = PyTuple_Pack(2, name.ptr(), here->tensor.ptr());
    if (!both) throw py::error_already_set();
    auto pair = py::reinterpret_steal<py::object>(both);
    if (here_.empty() || here_.begin() != here) continue;
    hand_out(here);
    return pair;
  }
}

// Makes the current stream wait for the one that may use the tensor. That is Python code, in which anything may happen:
// false if anything has changed, so look again.
bool Prefetch::make_ready(const Tensor& here) {
  if (current_stream_.is_none()) return true;
  const py::object tensor = here.tensor, ready_on = here.ready_on;
  const std::string name = here.name;
  const PlainTorch plain;
  const py::object now = current_stream_();
  if (!now.equal(ready_on)) {
    now.attr("wait_stream")(ready_on);
    tensor.attr("record_stream")(now);
  }
  const auto same = [&](const Tensor& one) { return one.tensor.is(tensor); };
  return !closed_ && std::any_of(here_.begin(), here_.end(), same);
}

py::object Prefetch::hand_out(std::list<Tensor>::iterator here) {
  states_[here->name] = State::taken;
  ++taken_;
  py::object tensor = std::move(here->tensor);
  here_.erase(here);
  return tensor;
}

// Until another tensor has come, or another thread that waits for one has done so.
void Prefetch::pull() {
  if (error_) raise_again(error_);
  if (interrupted_) fail(ErrorKind::usage, "the prefetch was interrupted");
  if (pulling_) {
    // A signal's handler, or what else ran in the middle: it would wait for what it interrupts.
    if (puller_ == std::this_thread::get_id())
      fail(ErrorKind::usage, "a tensor was asked for by what interrupted the waiting for another");
    await_change();
    return;
  }
  const Pulling pulling(*this);
  const py::object stream = current_stream_.is_none() ? py::object(py::none()) : current_stream_();
  const py::object weights = weights_;
  auto pair = py::reinterpret_steal<py::object>(PyIter_Next(weights.ptr()));
  if (!pair) {
    if (!PyErr_Occurred()) fail(ErrorKind::usage, kClosed);
    py::error_already_set error;
    if (!closed_) {
      // A signal handler's is for the one who was interrupted.
      const bool of_the_load = error.matches(py::module_::import("weightload.errors").attr("WeightLoadError"));
      interrupted_ = !of_the_load;
      if (of_the_load) error_ = error.value();
    }
    throw error;
  }
  const auto name = py::cast<std::string>(PyTuple_GetItem(pair.ptr(), 0));
  const auto state = states_.find(name);
  if (closed_ || state == states_.end() || state->second != State::awaited) return;
  here_.push_back({name, py::reinterpret_borrow<py::object>(PyTuple_GetItem(pair.ptr(), 1)), stream});
  state->second = State::here;
}

void Prefetch::await_change() {
  const uint64_t seen = [this] {
    const std::lock_guard<std::mutex> lock(mutex_);
    return changes_;
  }();
  {
    const ReleaseGil release;
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, kSignalInterval, [&] { return changes_ != seen; });
  }
  check_signals();
}

void Prefetch::tell_of_change() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++changes_;
  }
  changed_.notify_all();
}

void Prefetch::close() {
  closed_ = true;
  if (weights_) weights_.attr("close")();  // wakes whoever waits for a tensor
  if (generation_ != fork_generation()) return;
  tell_of_change();
  clear();
}

int Prefetch::traverse(visitproc visit, void* arg) const {
  Py_VISIT(weights_.ptr());
  Py_VISIT(current_stream_.ptr());
  Py_VISIT(error_.ptr());
  for (const Tensor& one : here_) {
    Py_VISIT(one.tensor.ptr());
    Py_VISIT(one.ready_on.ptr());
  }
  return 0;
}

// What is let go of may run Python code, which finds this without it.
void Prefetch::clear() {
  const py::object error = std::move(error_);
  std::list<Tensor> here;
  here.swap(here_);
}

namespace {

// Null where it was made without its initialiser.
Prefetch* prefetch_of(PyObject* self) {
  const auto* const instance = reinterpret_cast<py::detail::instance*>(self);
  const py::detail::value_and_holder held = const_cast<py::detail::instance*>(instance)->get_value_and_holder();
  return held.holder_constructed() ? static_cast<Prefetch*>(held.value_ptr()) : nullptr;
}

void collect_garbage_of(PyHeapTypeObject* heap_type) {
  PyTypeObject* const type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const Prefetch* const prefetch = prefetch_of(self);
    return prefetch ? prefetch->traverse(visit, arg) : 0;
  };
  type->tp_clear = [](PyObject* self) {
    if (Prefetch* const prefetch = prefetch_of(self)) prefetch->clear();
    return 0;
  };
}

}  // namespace

void register_prefetch(py::module_& module) {
  py::class_<Prefetch> made(module, "Prefetch", "Tensors of a load, each of which is handed out once.",
                            py::custom_type_setup(collect_garbage_of));
  made.def(py::init<py::object, const std::vector<std::string>&, py::object>(), py::arg("weights"), py::arg("names"),
           py::arg("current_stream"))
      .def("names", &Prefetch::names, "All names, taken or not, in the order in which they load.")
      .def("__len__", &Prefetch::size)
      .def("take", &Prefetch::take, py::arg("name"))
      .def("__iter__", [](py::object self) { return self; })
      .def("__next__", &Prefetch::next)
      .def("close", &Prefetch::close);
  refuse_copies(made);
}

}  // namespace weightload
