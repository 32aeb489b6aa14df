#include "load/tensor_reader.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings/gil.h"
#include "bindings/host_tensor.h"
#include "bindings/register.h"
#include "bindings/signals.h"

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

std::vector<RowRange> ranges_of(const std::vector<RowTuple>& rows) {
  std::vector<RowRange> ranges;
  for (const auto& [begin, end] : rows) ranges.push_back({begin, end});
  return ranges;
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
  const std::vector<RowRange> ranges = ranges_of(rows);
  return read(reader, tensor, &ranges);
}

// Small ones are mostly answered from memory.
bool is_at_hand(TensorReader& reader, ByteRange bytes) {
  if (bytes.size() < kLeastToMapAgain) {
    if (const auto answer = reader.is_at_hand(bytes, false)) return *answer;
  }
  const ReleaseGil release;
  return *reader.is_at_hand(bytes, true);
}

// A view, with the GIL where that waits for nobody.
template <typename Get>
auto view(const TensorReader& reader, Get&& get) {
  std::optional<ReleaseGil> release;
  if (reader.may_wait()) release.emplace();
  return get();
}

void bring_in(TensorReader& reader, uint32_t tensor, const std::vector<RowRange>* rows) {
  const ReleaseGil release;
  reader.bring_in(tensor, rows, check_signals);
}

// A small tensor: a view where `map` allows one, or private memory. Of a large one the number, for threads to load it;
// None, if there is none of that name.
py::object get(TensorReader& reader, py::handle name, bool map) {
  const std::optional<uint32_t> tensor = find(reader, name);
  if (!tensor) return py::none();
  const ByteRange bytes = reader.file().header().tensors[*tensor].bytes;
  const bool large = bytes.size() >= kLeastForThreads;
  // Threads map what is in the page cache in less time than mincore() takes to say so, of every page.
  if (large) return py::int_(*tensor);
  if (!map || !reader.can_map(*tensor)) return read(reader, *tensor, nullptr);
  if (!is_at_hand(reader, bytes)) bring_in(reader, *tensor, nullptr);
  const auto first = view(reader, [&] { return reader.first_view(*tensor, nullptr); });
  if (first) return wrap(reader, *first);
  if (bytes.size() < kLeastToMapAgain) return read(reader, *tensor, nullptr);
  return wrap(reader, view(reader, [&] { return reader.view_again(*tensor); }));
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
          [](TensorReader& reader, uint32_t tensor, const std::optional<RowTuple>& rows,
             const std::optional<std::vector<RowTuple>>& needed) {
            const RowRange range = rows ? RowRange{std::get<0>(*rows), std::get<1>(*rows)} : RowRange{};
            const TensorInfo info = rows ? reader.narrowed(tensor, range) : reader.file().header().tensors.at(tensor);
            if (!is_at_hand(reader, info.bytes)) {
              const auto ranges = needed ? ranges_of(*needed) : std::vector<RowRange>{range};
              bring_in(reader, tensor, needed || rows ? &ranges : nullptr);
            }
            const auto first = view(reader, [&] { return reader.first_view(tensor, rows ? &range : nullptr); });
            return first ? wrap(reader, *first) : py::none();
          },
          py::arg("tensor"), py::arg("rows"), py::arg("needed") = py::none(),
          "A view of the mapped file, all of the tensor or rows of it; None if somebody has been given any of it. "
          "`needed`: (begin, end) of the rows that will be looked at, where they are not all.")
      .def(
          "read", [](const TensorReader& reader, uint32_t tensor) { return read(reader, tensor, nullptr); },
          py::arg("tensor"), "A tensor in private memory, read in this thread.")
      .def("read_rows", read_rows, py::arg("tensor"), py::arg("rows"),
           "(begin, end) of rows, one behind the other, in private memory, read in this thread.")
      .def(
          "is_at_hand",
          [](TensorReader& reader, uint64_t begin, uint64_t end) {
            return reader.file().file() && is_at_hand(reader, {begin, end});
          },
          py::arg("begin"), py::arg("end"),
          "Whether these bytes can be looked at in the mapping without being brought in first.")
      .def("info", info, py::arg("tensor"), "(dtype, shape, begin, end); bytes count from the file's start.")
      .def("with_parts", with_parts, py::arg("parts"), py::keep_alive<0, 1>(),
           "The file with these (number, rows) only, by offset; rows are (begin, end), or None for all.");
  refuse_copies(reader);
}

}  // namespace weightload
