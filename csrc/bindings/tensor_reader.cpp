#include "pipeline/tensor_reader.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings/host_tensor.h"
#include "bindings/register.h"
#include "io/residency.h"

namespace py = pybind11;

namespace weightload {
namespace {

// From here on threads bring in a tensor faster than page faults do, unless it is in the page cache.
constexpr uint64_t kLeastReadAhead = 8 << 20;

using RowTuple = std::tuple<uint64_t, uint64_t>;

py::object wrap(const TensorReader& reader, const TensorInMemory& part) {
  PyObject* tensor = wrap_host_memory(part.info, reader.file().path(), part.data, part.memory);
  return py::reinterpret_steal<py::object>(tensor);
}

std::optional<uint32_t> find(const TensorReader& reader, py::handle name) {
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_Check(name.ptr()) ? PyUnicode_AsUTF8AndSize(name.ptr(), &size) : nullptr;
  if (text) return reader.find({text, static_cast<size_t>(size)});
  PyErr_Clear();  // no header has a name that is not UTF-8
  return std::nullopt;
}

// The tensor, as a view; its number, if that would not be right or not be fast; None, if there is none of that name.
py::object map_tensor(TensorReader& reader, py::handle name) {
  const std::optional<uint32_t> tensor = find(reader, name);
  if (!tensor) return py::none();
  if (!reader.can_map(*tensor)) return py::int_(*tensor);
  const ByteRange bytes = reader.file().header().tensors[*tensor].bytes;
  if (bytes.size() >= kLeastReadAhead && cached_bytes(*reader.file().file(), bytes) != bytes.size())
    return py::int_(*tensor);
  return wrap(reader, reader.view(*tensor));
}

py::object read(const TensorReader& reader, uint32_t tensor, const std::optional<std::vector<RowTuple>>& rows) {
  std::vector<RowRange> ranges;
  if (rows)
    for (const auto& [begin, end] : *rows) ranges.push_back({begin, end});
  TensorInMemory part;
  {
    py::gil_scoped_release release;
    part = reader.read(tensor, rows ? &ranges : nullptr);
  }
  return wrap(reader, part);
}

std::tuple<std::string, std::vector<uint64_t>, uint64_t, uint64_t> info(const TensorReader& reader, uint32_t number) {
  const TensorInfo& tensor = reader.file().header().tensors.at(number);
  return {std::string(dtype_name(tensor.dtype)), tensor.shape, tensor.bytes.begin, tensor.bytes.end};
}

using Part = std::tuple<uint32_t, std::optional<RowTuple>>;

std::shared_ptr<CheckpointFile> with_parts(const TensorReader& reader, const std::vector<Part>& parts) {
  std::vector<TensorInfo> tensors;
  for (const auto& [number, rows] : parts) {
    tensors.push_back(rows ? reader.narrowed(number, {std::get<0>(*rows), std::get<1>(*rows)})
                           : reader.file().header().tensors.at(number));
  }
  return std::const_pointer_cast<CheckpointFile>(reader.file().with_tensors(std::move(tensors)));
}

}  // namespace

void register_tensor_reader(py::module_& module) {
  py::class_<TensorReader>(module, "TensorReader", "Single tensors of a file, and rows of them, on the CPU.")
      .def(py::init<std::shared_ptr<CheckpointFile>>(), py::arg("file"), py::keep_alive<1, 2>())
      .def_property_readonly("file", &TensorReader::shared_file)
      .def("find", find, py::arg("name"), "A tensor's number, or None.")
      .def("map_tensor", map_tensor, py::arg("name"),
           "A view of the mapped file; the tensor's number where it should be read instead; None without such a name.")
      .def("can_map", &TensorReader::can_map, py::arg("tensor"))
      .def(
          "view", [](TensorReader& reader, uint32_t tensor) { return wrap(reader, reader.view(tensor)); },
          py::arg("tensor"), "A view of the mapped file, of which nobody else has one.")
      .def("read", read, py::arg("tensor"), py::arg("rows"),
           "Private memory, read in this thread: all of a tensor, or (begin, end) of rows one behind the other.")
      .def(
          "is_cached",
          [](const TensorReader& reader, uint64_t begin, uint64_t end) {
            return cached_bytes(*reader.file().file(), {begin, end}) == end - begin;
          },
          py::arg("begin"), py::arg("end"), "Whether these bytes are known to be in the page cache.")
      .def("info", info, py::arg("tensor"), "(dtype, shape, begin, end); bytes count from the file's start.")
      .def("with_parts", with_parts, py::arg("parts"), py::keep_alive<0, 1>(),
           "The file with these (number, rows) only, by offset; rows are (begin, end), or None for all.");
}

}  // namespace weightload
