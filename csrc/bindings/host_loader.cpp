#include "pipeline/host_loader.h"

#include <pybind11/stl.h>

#include <mutex>

#include "base/error.h"
#include "bindings/host_tensor.h"
#include "bindings/register.h"

namespace py = pybind11;

namespace weightload {
namespace {

using FileList = std::vector<std::shared_ptr<CheckpointFile>>;

// How long a wait lasts before Python's signal handlers get their turn: Ctrl-C is felt within this.
constexpr std::chrono::milliseconds kSignalInterval{100};

// Iterator of (name, tensor). Threads may share it: each call has the loader to itself.
class PyHostLoader {
 public:
  PyHostLoader(const py::list& files, std::vector<std::vector<uint32_t>> selection, const HostLoaderOptions& options)
      : python_files_(py::list(files.attr("copy")())) {
    const FileList list = py::cast<FileList>(files);
    py::gil_scoped_release release;
    loader_ = std::make_unique<HostLoader>(CheckpointFiles(list.begin(), list.end()), std::move(selection), options);
    total_bytes_ = loader_->total_bytes();
    tensor_count_ = loader_->tensor_count();
  }
  ~PyHostLoader() { close(); }

  py::object next() {
    std::unique_lock<std::recursive_mutex> lock(mutex_, std::try_to_lock);
    // In a forked child nobody may ever unlock it; there next() only throws.
    if (!lock && !loader_->forked()) {
      py::gil_scoped_release release;
      lock.lock();
    }
    try {
      HostTensor tensor;
      if (take(tensor)) return pair(tensor);
    } catch (...) {
      // As with a generator, an exception is the end.
      shut();
      throw;
    }
    shut();
    throw py::stop_iteration();
  }

  void close() {
    std::unique_lock<std::recursive_mutex> lock(mutex_, std::defer_lock);
    if (!loader_->forked()) {
      py::gil_scoped_release release;
      loader_->interrupt();  // a call of next() in another thread returns soon
      lock.lock();
    }
    shut();
  }

  uint64_t total_bytes() const { return total_bytes_; }
  size_t tensor_count() const { return tensor_count_; }

 private:
  // The next tensor, or false at the end. Waits without the GIL.
  bool take(HostTensor& tensor) {
    // Almost always the tensor is there; then letting go of the GIL would cost more than all the rest.
    HostLoader::Step step = loader_->next(tensor, std::chrono::milliseconds(0));
    while (step == HostLoader::Step::not_ready) {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      py::gil_scoped_release release;
      step = loader_->next(tensor, kSignalInterval);
    }
    return step == HostLoader::Step::tensor;
  }

  static py::object pair(HostTensor& tensor) {
    const std::string& name = tensor.info->name;
    auto text = py::reinterpret_steal<py::object>(
        PyUnicode_DecodeUTF8(name.data(), static_cast<Py_ssize_t>(name.size()), "strict"));
    if (!text) throw py::error_already_set();
    const auto wrapped = py::reinterpret_steal<py::object>(wrap_host_tensor(tensor));
    auto both = py::reinterpret_steal<py::object>(PyTuple_Pack(2, text.ptr(), wrapped.ptr()));
    if (!both) throw py::error_already_set();
    return both;
  }

  // With mutex_ held.
  void shut() {
    {
      py::gil_scoped_release release;
      loader_->close();
    }
    python_files_ = py::list();
  }

  py::list python_files_;  // keeps what they read from alive, for files over a bytes object
  // Taken with the GIL released, or not waited for. Recursive: a signal handler that runs while next() waits may close
  // the iterator it interrupted.
  std::recursive_mutex mutex_;
  std::unique_ptr<HostLoader> loader_;
  uint64_t total_bytes_ = 0;
  size_t tensor_count_ = 0;
};

}  // namespace

void register_host_loader(py::module_& module) {
  py::class_<PyHostLoader>(module, "HostLoader", "Iterator of (name, tensor) over host memory.")
      .def(py::init([](const py::list& files, std::vector<std::vector<uint32_t>> selection, bool map, bool read_ahead,
                       unsigned threads, uint64_t window_bytes, uint64_t task_bytes, uint64_t block_bytes) {
             HostLoaderOptions options;
             options.map = map;
             options.read_ahead = read_ahead;
             options.threads = threads;
             options.window_bytes = window_bytes;
             options.task_bytes = task_bytes;
             options.block_bytes = block_bytes;
             return std::make_unique<PyHostLoader>(files, std::move(selection), options);
           }),
           py::arg("files"), py::arg("selection"), py::kw_only(), py::arg("map"), py::arg("read_ahead"),
           py::arg("threads"), py::arg("window_bytes"), py::arg("task_bytes"), py::arg("block_bytes"))
      .def("__iter__", [](py::object self) { return self; })
      .def("__next__", &PyHostLoader::next)
      .def("close", &PyHostLoader::close, "Stops and joins the reading threads and lets go of the files.")
      .def_property_readonly("total_bytes", &PyHostLoader::total_bytes, "bytes of the selected tensors")
      .def("__len__", &PyHostLoader::tensor_count);
}

}  // namespace weightload
