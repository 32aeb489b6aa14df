#include "pipeline/tensor_reader.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings/gil.h"
#include "bindings/host_tensor.h"
#include "bindings/register.h"
#include "bindings/signals.h"
#include "io/residency.h"

namespace py = pybind11;

namespace weightload {
namespace {

// Below, reading again costs no more than mapping again, and mappings are limited.
constexpr uint64_t kLeastToMapAgain = 1 << 20;

// Bytes from which threads bring in a tensor faster than the calling one, starting them included.
constexpr uint64_t kLeastForThreads = 8 << 20;

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

py::object read(const TensorReader& reader, uint32_t tensor, const std::vector<RowRange>* rows) {
  TensorInMemory part;
  {
    const ReleaseGil release;
    part = reader.read(tensor, rows, check_signals);
  }
  return wrap(reader, part);
}

py::object read_rows(const TensorReader& reader, uint32_t tensor, const std::vector<RowTuple>& rows) {
  std::vector<RowRange> ranges;
  for (const auto& [begin, end] : rows) ranges.push_back({begin, end});
  return read(reader, tensor, &ranges);
}

// What can be had at once: a view where `map` allows one, private memory for what is small. Otherwise the tensor's
// number, for threads to load it; None, if there is none of that name.
py::object get(TensorReader& reader, py::handle name, bool map) {
  const std::optional<uint32_t> tensor = find(reader, name);
  if (!tensor) return py::none();
  const ByteRange bytes = reader.file().header().tensors[*tensor].bytes;
  const bool large = bytes.size() >= kLeastForThreads;
  if (!map || !reader.can_map(*tensor)) return large ? py::int_(*tensor) : read(reader, *tensor, nullptr);
  if (large && cached_bytes(*reader.file().file(), bytes) != bytes.size()) return py::int_(*tensor);
  if (const auto first = reader.first_view(*tensor, nullptr)) return wrap(reader, *first);
  return bytes.size() < kLeastToMapAgain ? read(reader, *tensor, nullptr) : wrap(reader, reader.view_again(*tensor));
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
  py::class_<TensorReader> reader(module, "TensorReader", "Single tensors of a file, and rows of them, on the CPU.");
  reader.attr("LEAST_FOR_THREADS") = kLeastForThreads;
  reader.def(py::init<std::shared_ptr<CheckpointFile>>(), py::arg("file"), py::keep_alive<1, 2>())
      .def_property_readonly("file", &TensorReader::shared_file)
      .def("find", find, py::arg("name"), "A tensor's number, or None.")
      .def("get", get, py::arg("name"), py::arg("map"),
           "A view of the mapped file (map=True), or private memory; the tensor's number where threads should load it; "
           "None without such a name.")
      .def("can_map", &TensorReader::can_map, py::arg("tensor"))
      .def(
          "first_view",
          [](TensorReader& reader, uint32_t tensor, const std::optional<RowTuple>& rows) {
            const RowRange range = rows ? RowRange{std::get<0>(*rows), std::get<1>(*rows)} : RowRange{};
            const auto view = reader.first_view(tensor, rows ? &range : nullptr);
            return view ? wrap(reader, *view) : py::none();
          },
          py::arg("tensor"), py::arg("rows"),
          "A view of the mapped file, all of the tensor or rows of it; None if somebody has been given any of it.")
      .def(
          "read", [](const TensorReader& reader, uint32_t tensor) { return read(reader, tensor, nullptr); },
          py::arg("tensor"), "A tensor in private memory, read in this thread.")
      .def("read_rows", read_rows, py::arg("tensor"), py::arg("rows"),
           "(begin, end) of rows, one behind the other, in private memory, read in this thread.")
      .def(
          "is_cached",
          [](const TensorReader& reader, uint64_t begin, uint64_t end) {
            return cached_bytes(*reader.file().file(), {begin, end}) == end - begin;
          },
          py::arg("begin"), py::arg("end"), "Whether these bytes are known to be in the page cache.")
      .def("info", info, py::arg("tensor"), "(dtype, shape, begin, end); bytes count from the file's start.")
      .def("with_parts", with_parts, py::arg("parts"), py::keep_alive<0, 1>(),
           "The file with these (number, rows) only, by offset; rows are (begin, end), or None for all.");
  refuse_copies(reader);
}

}  // namespace weightload
