#include "bindings/register.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ core of weightload. Private: use the weightload package.";
  weightload::register_gil(module);
  weightload::register_errors(module);
  weightload::register_connection(module);
  weightload::register_checkpoint_file(module);
  weightload::register_device_target(module);
  weightload::register_group(module);
  weightload::register_host_loader(module);
  weightload::register_device_loader(module);
  weightload::register_prefetch(module);
  weightload::register_finaliser(module);
  weightload::register_scoped_variable(module);
  weightload::register_plain_torch(module);
  weightload::register_tensor_memory(module);
  weightload::register_tensor_reader(module);
  weightload::register_kept_memory(module);
  weightload::register_fault_hook(module);
}
