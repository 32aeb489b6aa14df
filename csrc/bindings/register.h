#pragma once
#include <pybind11/pybind11.h>

namespace weightload {

// An object that was made without its initialiser (`Class.__new__(Class)`, a copy) has no C++ part. pybind11 then
// allocates one where it is asked for, and leaves it as it comes; here that is a TypeError. For every class.
template <typename Class>
void refuse_uninitialised() {
  pybind11::detail::get_type_info(typeid(Class))->operator_new = [](size_t) -> void* {
    throw pybind11::type_error("this object was made without its initialiser: __init__() was never called");
  };
}

// One noun a file; module.cpp calls them all.
void register_gil(pybind11::module_& module);
void register_errors(pybind11::module_& module);
void register_checkpoint_file(pybind11::module_& module);
void register_device_target(pybind11::module_& module);
void register_group(pybind11::module_& module);
void register_host_loader(pybind11::module_& module);
void register_device_loader(pybind11::module_& module);
void register_prefetch(pybind11::module_& module);
void register_tensor_reader(pybind11::module_& module);
void register_fault_hook(pybind11::module_& module);

}  // namespace weightload
