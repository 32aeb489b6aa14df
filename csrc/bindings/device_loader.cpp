#include "load/device_loader.h"

#include <optional>
#include <utility>

#include "base/error.h"
#include "bindings/device_target.h"
#include "bindings/device_tensor.h"
#include "bindings/gil.h"
#include "bindings/group.h"
#include "bindings/py_loader.h"
#include "bindings/register.h"
#include "device/accelerator.h"

namespace py = pybind11;

namespace weightload {

static void warn_of(DeviceLoader& loader) {
  if (!loader.found_pageable()) return;
  const char* const text =
      "weightload could not page-lock host memory (ulimit -l, or the driver refused) and reads through pageable "
      "memory: the same bytes, at a fraction of the speed";
  if (PyErr_WarnEx(PyExc_RuntimeWarning, text, 1) != 0) throw py::error_already_set();
}

namespace {

using PyDeviceLoader = PyLoader<DeviceLoader, DeviceTensor, wrap_device_tensor>;

DeviceBlockRef device_place(PyObject* tensor) { return adopt_tensor(THPVariable_Unpack(tensor)); }

py::dict device_counts(PyDeviceLoader& self) {
  const DeviceLoadStats stats = [&] {
    const ReleaseGil release;
    return self.loader().stats();
  }();
  py::dict result;
  result["copies"] = stats.copies;
  result["slots_filled"] = stats.slots_filled;
  result["slots"] = stats.ring.slots;
  result["pageable_slots"] = stats.ring.pageable_slots;
  result["blocks"] = stats.blocks;
  result["block_bytes"] = stats.block_bytes;
  result["copy_s"] = in_seconds(stats.copy_ns);
  result["allocate_s"] = in_seconds(stats.allocate_ns);
  result["pin_s"] = in_seconds(stats.ring.make_ns);
  result["ring_wait_s"] = in_seconds(stats.ring.wait_ns);
  return result;
}

}  // namespace

void register_device_loader(py::module_& module) {
  py::class_<PyDeviceLoader> loader(
      module, "DeviceLoader",
      "Iterator of (name, tensor) over an accelerator's memory; None in place of tensors that were read in place.");
  loader
      .def(py::init([](const DeviceTarget& target, const py::list& files,
                       const std::vector<std::vector<uint32_t>>& selection, const py::list& places,
                       std::optional<PyGroup*> group, const WantedParts& parts, unsigned threads,
                       unsigned threads_at_first, uint64_t block_bytes, uint64_t window_bytes, ReadMode read) {
             DeviceLoaderOptions options;
             options.threads = threads;
             options.threads_at_first = threads_at_first;
             options.slot_bytes = target.slot_bytes;
             options.cold = target.cold;
             options.block_bytes = block_bytes;
             options.window_bytes = window_bytes;
             options.read = read;
             options.pause = check_signals;
             return std::make_unique<PyDeviceLoader>(
                 files,
                 [&, blocks = adopt_places<DeviceBlockRef>(places, device_place)](CheckpointFiles opened) mutable {
                   return std::make_unique<DeviceLoader>(target.device, target.ring, std::move(opened), selection,
                                                         std::move(blocks), exchange_of(group.value_or(nullptr)),
                                                         options, parts);
                 });
           }),
           py::arg("target"), py::arg("files"), py::arg("selection"), py::arg("places"), py::arg("group"),
           py::arg("parts"), py::kw_only(), py::arg("threads"), py::arg("threads_at_first"), py::arg("block_bytes"),
           py::arg("window_bytes"), py::arg("read"))
      .def("device_counts", &device_counts, "What the ring and the side stream have done so far, beside counts().");
  define_iteration(loader);
  refuse_copies(loader);
}

}  // namespace weightload
