#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace weightload {

// Throws Error{read} with the words of what Python code raised while a file was read from `offset` on. But what a
// signal's handler raised, and Ctrl-C, are not of the file: they go on as they are. With the GIL held.
[[noreturn]] void fail_read(pybind11::error_already_set& error, const std::string& path, uint64_t offset);

}  // namespace weightload
