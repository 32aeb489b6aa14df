#pragma once
#include <pybind11/pybind11.h>

namespace weightload {

// One noun a file; module.cpp calls them all.
void register_errors(pybind11::module_& module);
void register_checkpoint_file(pybind11::module_& module);
void register_device_target(pybind11::module_& module);
void register_group(pybind11::module_& module);
void register_host_loader(pybind11::module_& module);
void register_device_loader(pybind11::module_& module);
void register_tensor_reader(pybind11::module_& module);
void register_kept_memory(pybind11::module_& module);
void register_fault_hook(pybind11::module_& module);

}  // namespace weightload
