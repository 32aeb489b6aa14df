#pragma once
#include <pybind11/pybind11.h>

#include <string>

namespace weightload {

// What every class of ours says of objects that are made in other ways than by its initialiser.
//
// One of `Class.__new__(Class)` has no C++ part: pybind11 allocates one where it is asked for, and leaves it as it
// comes. Here that is a TypeError. Pickling by the oldest protocol makes an object of pybind11's own base class, which
// ends the process.
template <typename Class>
void refuse_copies(Class& python_class) {
  pybind11::detail::get_type_info(typeid(typename Class::type))->operator_new = [](size_t) -> void* {
    throw pybind11::type_error("this object was made without its initialiser: __init__() was never called");
  };
  const auto refuse = [](const pybind11::object& self, const pybind11::args&) {
    throw pybind11::type_error("cannot pickle or copy a " + std::string(Py_TYPE(self.ptr())->tp_name));
  };
  python_class.def("__reduce_ex__", refuse).def("__reduce__", refuse);
}

// The same of an enumeration, which may be copied.
template <typename Class>
void copy_by_number(Class& python_class) {
  const auto reduce = [](const pybind11::object& self, const pybind11::args&) {
    return pybind11::make_tuple(pybind11::type::of(self), pybind11::make_tuple(pybind11::int_(self)));
  };
  python_class.def("__reduce_ex__", reduce).def("__reduce__", reduce);
}

// One noun a file; module.cpp calls them all.
void register_gil(pybind11::module_& module);
void register_errors(pybind11::module_& module);
void register_checkpoint_file(pybind11::module_& module);
void register_connection(pybind11::module_& module);
void register_device_target(pybind11::module_& module);
void register_group(pybind11::module_& module);
void register_host_loader(pybind11::module_& module);
void register_device_loader(pybind11::module_& module);
void register_prefetch(pybind11::module_& module);
void register_finaliser(pybind11::module_& module);
void register_scoped_variable(pybind11::module_& module);
void register_plain_torch(pybind11::module_& module);
void register_tensor_memory(pybind11::module_& module);
void register_tensor_reader(pybind11::module_& module);
void register_kept_memory(pybind11::module_& module);
void register_fault_hook(pybind11::module_& module);

}  // namespace weightload
