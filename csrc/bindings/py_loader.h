#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "base/start_thread.h"
#include "bindings/gil.h"
#include "bindings/load_counts.h"
#include "bindings/signals.h"
#include "checkpoint/checkpoint_file.h"
#include "load/loader.h"

namespace weightload {

using FileList = std::vector<std::shared_ptr<CheckpointFile>>;

// Says, once a load, what its user should know. Found by argument type: a kind of Loader may have its own.
inline void warn_of(const Loader&) {}

// A load of the pipeline, and whose turn it is to use it.
template <typename Kind>
class LoadOfPython final : public LiveLoad {
 public:
  explicit LoadOfPython(std::unique_ptr<Kind> made) : loader(std::move(made)) {}

  void interrupt() noexcept override { loader->interrupt(); }
  void close() noexcept override {
    const std::unique_lock<std::recursive_mutex> lock(mutex);
    loader->close();
  }

  // Taken with the GIL released, or not waited for. Recursive: a signal handler that runs while next() waits may close
  // the iterator it interrupted.
  std::recursive_mutex mutex;
  const std::unique_ptr<Kind> loader;
};

// Iterator of (name, tensor) over a kind of Loader (HostLoader, DeviceLoader), whose items `wrap` makes Python objects
// of. Threads may share it: each call has the loader to itself.
//
// Note [No Python code in between]
// Python code can run wherever Python is called: a handler of signals, a hook for warnings, a finaliser that the
// garbage collector calls when an object is made. It may do anything, close this iterator too. So it runs before an
// item is taken or when its objects have been made; while they are made the files are held.
template <typename Kind, typename Item, PyObject* (*wrap)(Item&)>
class PyLoader {
 public:
  // Calls `make` with the files, without the GIL.
  template <typename Make>
  PyLoader(const pybind11::list& files, Make&& make) : python_files_(pybind11::list(files.attr("copy")())) {
    const FileList list = pybind11::cast<FileList>(files);
    for (const auto& file : list) {
      if (!file) throw pybind11::type_error("a file to load must be a CheckpointFile");
    }
    close_what_was_left();
    {
      const ReleaseGil release;
      load_ = std::make_shared<LoadOfPython<Kind>>(make(CheckpointFiles(list.begin(), list.end())));
    }
    close_at_exit(load_);
  }
  ~PyLoader() { close(); }  // which leaves what has threads to others where this is one of them

  pybind11::object next() {
    const Inside inside;
    std::unique_lock<std::recursive_mutex> lock(load_->mutex, std::try_to_lock);
    // In a forked child nobody may ever unlock it; there next() only throws.
    if (!lock && !loader().forked()) {
      if (thread_of_loads().is_set())
        throw Error(ErrorKind::usage, "next() was called by a thread that another load waits for");
      const ReleaseGil release;
      lock.lock();
    }
    if (running_ && !loader().forked())
      throw Error(ErrorKind::usage, "next() was called while it runs, by what interrupted it");
    try {
      run_signal_handlers();  // or, while a load is drained that never waits, Ctrl-C would be felt at its end
      Item item;
      if (take(item)) {
        const pybind11::list files = python_files_;
        pybind11::object both = pair(item);
        warn_of(loader());
        return both;
      }
    } catch (const Error& error) {
      tell_partner(error);
      shut();
      throw;
    } catch (...) {
      // As with a generator, an exception is the end.
      shut();
      throw;
    }
    shut();
    if (interpreter_is_ending()) fail_at_exit();  // not its own end, perhaps
    run_signal_handlers();
    throw pybind11::stop_iteration();
  }

  void close() {
    if (thread_of_loads().is_set()) return close_later(load_, python_files_);  // Note [Finalisers in threads of loads]
    std::unique_lock<std::recursive_mutex> lock(load_->mutex, std::defer_lock);
    if (!loader().forked()) {
      const ReleaseGil release(AtExit::go_on);
      load_->interrupt();  // a call of next() in another thread returns soon
      lock.lock();
    }
    if (running_) return;  // a signal's handler, while next() does the threads' work: it ends by itself now
    shut();
  }

  // Has the ranks that share another load hear of an error of this one, when that one is closed.
  void tell_ranks_of(const PyLoader& other) { partner_ = other.load_; }

  uint64_t total_bytes() const { return loader().total_bytes(); }
  size_t tensor_count() const { return loader().tensor_count(); }
  Kind& loader() const { return *load_->loader; }
  pybind11::dict counts() const { return load_counts(loader().counts()); }

 private:
  // The next tensor, or false at the end. Waits without the GIL.
  bool take(Item& item) {
    // Almost always the tensor is there; then letting go of the GIL would cost more than all the rest. Collectives are
    // never issued with the GIL held: a backend's thread may want it, to free a tensor of the caller's, under the lock
    // that issuing takes (Gloo's does).
    Loader::Step step = Loader::Step::not_ready;
    if (!loader().needs_others()) step = loader().next(item, std::chrono::milliseconds(0));
    while (step == Loader::Step::not_ready) {
      check_signals();
      const ReleaseGil release;
      const Running running(running_);
      step = loader().next(item, kSignalInterval);
    }
    return step == Loader::Step::tensor;
  }

  static pybind11::object pair(Item& item) {
    const std::string& name = item.info->name;
    auto text = pybind11::reinterpret_steal<pybind11::object>(
        PyUnicode_DecodeUTF8(name.data(), static_cast<Py_ssize_t>(name.size()), "strict"));
    if (!text) throw pybind11::error_already_set();
    const auto wrapped = pybind11::reinterpret_steal<pybind11::object>(wrap(item));
    auto both = pybind11::reinterpret_steal<pybind11::object>(PyTuple_Pack(2, text.ptr(), wrapped.ptr()));
    if (!both) throw pybind11::error_already_set();
    return both;
  }

  void tell_partner(const Error& error) {
    if (!partner_) return;
    const ReleaseGil release;
    const std::lock_guard<std::recursive_mutex> lock(partner_->mutex);
    partner_->loader->give_reason(error);
  }

  // With the mutex held.
  void shut() {
    {
      const ReleaseGil release(AtExit::go_on);
      loader().close();
    }
    python_files_ = pybind11::list();
  }

  struct Running {
    explicit Running(bool& flag) : running(flag) { running = true; }
    ~Running() { running = false; }
    bool& running;
  };

  pybind11::list python_files_;  // keeps what they read from alive, for files over a bytes object
  std::shared_ptr<LoadOfPython<Kind>> load_, partner_;
  bool running_ = false;  // next() of the loader runs, in the thread that has the mutex; guarded by it
};

// Memory to load into: what `adopt` makes of the tensors of a list, and an empty Memory for its Nones.
template <typename Memory>
std::vector<Memory> adopt_places(const pybind11::list& places, Memory (*adopt)(PyObject*)) {
  std::vector<Memory> memory;
  for (const pybind11::handle place : places) {
    if (place.is_none()) {
      memory.emplace_back();
    } else if (THPVariable_Check(place.ptr()) && THPVariable_Unpack(place.ptr()).is_contiguous()) {
      memory.push_back(adopt(place.ptr()));
    } else {
      throw pybind11::type_error("a place to load into must be a contiguous tensor or None");
    }
  }
  return memory;
}

// What every loader class has in Python.
template <typename Class>
void define_iteration(Class& loader) {
  using Type = typename Class::type;
  loader.def("__iter__", [](pybind11::object self) { return self; })
      .def("__next__", &Type::next)
      .def("counts", &Type::counts,
           "What the load has counted so far; weightload/_base/load_stats.py makes sense of it.")
      .def("tell_ranks_of", &Type::tell_ranks_of, pybind11::arg("other"),
           "Has the ranks that share another load hear of an error of this one, when that one is closed.")
      .def("close", &Type::close, "Stops and joins the reading threads and lets go of the files.")
      .def_property_readonly("total_bytes", &Type::total_bytes, "bytes of the selected tensors")
      .def("__len__", &Type::tensor_count);
}

}  // namespace weightload
