#include "load/host_loader.h"

#include <optional>
#include <utility>

#include "bindings/group.h"
#include "bindings/host_tensor.h"
#include "bindings/py_loader.h"
#include "bindings/register.h"

namespace py = pybind11;

namespace weightload {
namespace {

using PyHostLoader = PyLoader<HostLoader, HostTensor, wrap_host_tensor>;

}  // namespace

void register_host_loader(py::module_& module) {
  py::enum_<ReadMode> readmode(module, "ReadMode");
  readmode.value("auto", ReadMode::automatic).value("buffered", ReadMode::buffered).value("direct", ReadMode::direct);
  readmode.value("uncached", ReadMode::uncached);
  copy_by_number(readmode);

  py::class_<PyHostLoader> loader(module, "HostLoader", "Iterator of (name, tensor) over host memory.");
  loader.def(
      py::init([](const py::list& files, const std::vector<std::vector<uint32_t>>& selection, const py::list& places,
                  std::optional<PyGroup*> group, const WantedParts& parts, bool map, bool must_map, bool read_ahead,
                  unsigned threads, unsigned cold_threads, unsigned threads_at_first, uint64_t window_bytes,
                  uint64_t task_bytes, uint64_t block_bytes, ReadMode read) {
        HostLoaderOptions options;
        options.map = map;
        options.must_map = must_map;
        options.read_ahead = read_ahead;
        options.threads = threads;
        options.cold_threads = cold_threads;
        options.threads_at_first = threads_at_first;
        options.window_bytes = window_bytes;
        options.task_bytes = task_bytes;
        options.block_bytes = block_bytes;
        options.read = read;
        options.pause = check_signals;
        auto memory = adopt_places<HostMemoryRef>(places, tensor_memory);
        return std::make_unique<PyHostLoader>(files, [&](CheckpointFiles opened) {
          return std::make_unique<HostLoader>(std::move(opened), selection, std::move(memory),
                                              exchange_of(group.value_or(nullptr)), options, parts);
        });
      }),
      py::arg("files"), py::arg("selection"), py::arg("places"), py::arg("group"), py::arg("parts"), py::kw_only(),
      py::arg("map"), py::arg("must_map"), py::arg("read_ahead"), py::arg("threads"), py::arg("cold_threads"),
      py::arg("threads_at_first"), py::arg("window_bytes"), py::arg("task_bytes"), py::arg("block_bytes"),
      py::arg("read"));
  define_iteration(loader);
  refuse_copies(loader);
}

}  // namespace weightload
