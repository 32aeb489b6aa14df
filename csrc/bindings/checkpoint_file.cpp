#include "checkpoint/checkpoint_file.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <utility>

#include "bindings/byte_tap.h"
#include "bindings/gil.h"
#include "bindings/load_counts.h"
#include "bindings/register.h"
#include "bindings/remote_source.h"
#include "bindings/signals.h"
#include "checkpoint/selected_tensors.h"
#include "page_cache/residency.h"

namespace py = pybind11;

namespace weightload {
namespace {

py::object metadata(const CheckpointFile& file) {
  if (!file.header().has_metadata) return py::none();
  py::dict pairs;
  for (const auto& [key, value] : file.header().metadata) pairs[py::str(key)] = py::str(value);
  return pairs;
}

py::list names(const CheckpointFile& file) {
  const auto& tensors = file.header().tensors;
  py::list list(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) list[i] = py::str(tensors[i].name);
  return list;
}

py::list tensors(const CheckpointFile& file) {
  py::list list;
  for (const TensorInfo& tensor : file.header().tensors) {
    const std::string_view dtype = dtype_name(tensor.dtype);
    list.append(py::make_tuple(tensor.name, py::str(dtype.data(), dtype.size()), py::tuple(py::cast(tensor.shape)),
                               tensor.bytes.begin, tensor.bytes.end));
  }
  return list;
}

using FileList = std::vector<std::shared_ptr<CheckpointFile>>;
using Selection = std::vector<std::vector<uint32_t>>;

py::list repeated(const FileList& files, const std::optional<Selection>& selection) {
  std::vector<std::vector<SelectedTensor>> found;
  {
    const ReleaseGil release;
    found = repeated_tensors(CheckpointFiles(files.begin(), files.end()), selection ? &*selection : nullptr);
  }
  py::list list;
  for (const std::vector<SelectedTensor>& places : found) {
    py::list at;
    for (const SelectedTensor& place : places) at.append(py::make_tuple(place.file, place.index));
    const std::string& name = files[places[0].file]->header().tensors[places[0].index].name;
    list.append(py::make_tuple(py::str(name), at));
  }
  return list;
}

// The same file with some of its tensors, by number, under other names where there are any.
std::shared_ptr<CheckpointFile> with_tensors(const CheckpointFile& file, const std::vector<uint32_t>& numbers,
                                             std::optional<std::vector<std::string>> names) {
  std::vector<TensorInfo> some;
  some.reserve(numbers.size());
  for (const uint32_t number : numbers) some.push_back(file.header().tensors.at(number));
  if (names) {
    for (size_t i = 0; i < some.size(); ++i) some[i].name = std::move(names->at(i));
  }
  return std::const_pointer_cast<CheckpointFile>(file.with_tensors(std::move(some)));
}

// Reads everything once, to learn whether every byte can be read.
uint64_t read_all(const CheckpointFile& file) {
  const uint64_t most = file.is_remote() ? 8 << 20 : 1 << 20;
  const std::unique_ptr<char[]> scratch(new char[most]);
  Pace pace(Pace::kAnyNumber, most);
  const ReleaseGil release;
  for (uint64_t at = 0; at < file.size(); at += most) {
    const ByteRange part{at, std::min(file.size(), at + most)};
    file.read(part, scratch.get(), pace, check_signals);
  }
  file.source().require_unchanged(0);
  return file.size();
}

py::object remote_object(const CheckpointFile& file) {
  const auto* const remote = dynamic_cast<const RemoteSource*>(&file.source());
  return remote ? remote->object() : py::none();
}

void read_into(const CheckpointFile& file, uint64_t offset, const py::buffer& memory) {
  const py::buffer_info info = memory.request(/*writable=*/true);
  Pace pace(Pace::kAnyNumber, 1 << 20);
  const ReleaseGil release;
  file.read({offset, offset + static_cast<uint64_t>(info.size * info.itemsize)}, static_cast<char*>(info.ptr), pace,
            check_signals);
  file.source().require_unchanged(offset);
}

// Of the header's text. All ranks that compare it run the same build of the same standard library (Murmur, in GNU's).
uint64_t header_digest(const CheckpointFile& file) {
  std::string text(file.header().data_begin, '\0');
  Pace pace;
  read_in_pieces(file.source(), {0, text.size()}, text.data(), pace, check_signals);
  file.source().require_unchanged(0);
  return std::hash<std::string>()(text);
}

uint64_t bytes_of(const CheckpointFile& file, const std::vector<uint32_t>& tensors) {
  uint64_t total = 0;
  for (const uint32_t tensor : tensors) total += file.header().tensors.at(tensor).bytes.size();
  return total;
}

std::optional<uint64_t> resident_bytes(const py::bytes& encoded_path) {
  const std::string path = encoded_path;
  const ReleaseGil release;
  const auto file = File::open(path, check_signals);
  return cached_bytes(*file, {0, file->size()});
}

}  // namespace

void register_checkpoint_file(py::module_& module) {
  py::class_<CheckpointFile, std::shared_ptr<CheckpointFile>> made(
      module, "CheckpointFile", "An open safetensors file with its validated header.");
  made.def_property_readonly("path",
                             [](const CheckpointFile& file) {
                               const std::string& path = file.path();
                               return py::reinterpret_steal<py::str>(
                                   PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
                             })
      .def_property_readonly("is_remote", &CheckpointFile::is_remote, "whether a server has it")
      .def_property_readonly("remote", remote_object, "the object behind open_source(), or None")
      .def("read_into", read_into, py::arg("offset"), py::arg("memory"), "Fills a buffer with bytes from `offset` on.")
      .def_property_readonly("size", &CheckpointFile::size, "bytes, header included")
      .def_property_readonly(
          "open_s", [](const CheckpointFile& file) { return in_seconds(file.open_ns()); },
          "what opening took, the header's reading and parsing included")
      .def_property_readonly(
          "parse_s", [](const CheckpointFile& file) { return in_seconds(file.parse_ns()); }, "of this, the parsing")
      .def_property_readonly("data_begin", [](const CheckpointFile& file) { return file.header().data_begin; })
      .def_property_readonly("metadata", metadata, "dict of str to str, or None where the header has none")
      .def("__len__", [](const CheckpointFile& file) { return file.header().tensors.size(); })
      .def("names", names, "tensor names by offset")
      .def("tensors", tensors, "(name, dtype, shape, begin, end) by offset; begin and end count from the file's start")
      .def("header_digest", header_digest, py::call_guard<ReleaseGil>(),
           "A 64-bit digest of the header as it is in the file; reads it again.")
      .def("with_tensors", with_tensors, py::arg("numbers"), py::arg("names") = py::none(),
           "The same open file with some of its tensors; `names`: what they are called there.")
      .def(
          "with_tap",
          [](const CheckpointFile& file, py::object tap) {
            return std::const_pointer_cast<CheckpointFile>(
                file.with_tap(std::make_shared<const PythonTap>(std::move(tap), file.path())));
          },
          py::arg("tap"), "The same open file, of which a load tells the tap what it reads; see bindings/byte_tap.h.")
      .def(
          "also_read_by_others",
          [](const CheckpointFile& file) {
            return std::const_pointer_cast<CheckpointFile>(file.also_read_by_others());
          },
          "The same open file, which a load reads through the page cache, since others do.")
      .def("bytes_of", bytes_of, py::arg("tensors"), "Bytes of the tensors with these numbers.")
      .def("read_all", read_all, "Reads every byte once and returns their number.");
  refuse_copies(made);

  module.def(
      "open_files",
      [](const std::vector<py::bytes>& encoded_paths, unsigned threads) {
        const std::vector<std::string> paths(encoded_paths.begin(), encoded_paths.end());
        const ReleaseGil release;
        std::vector<std::shared_ptr<CheckpointFile>> files;
        for (auto& file : CheckpointFile::open_all(paths, threads, check_signals))
          files.push_back(std::const_pointer_cast<CheckpointFile>(file));
        return files;
      },
      py::arg("paths"), py::arg("threads"));

  module.def(
      "repeated_tensors", repeated, py::arg("files"), py::arg("selection"),
      "Of every name that the selection (None: all tensors) has more than once: the name, and the numbers of its "
      "files and of its tensors in them.");
  module.def(
      "selection_digest",
      [](const FileList& files, const Selection& selection) {
        const ReleaseGil release;
        return selection_digest(CheckpointFiles(files.begin(), files.end()), selection);
      },
      py::arg("files"), py::arg("selection"), "A 64-bit digest of which tensors these are.");

  module.def(
      "open_source",
      [](py::object source, const std::string& path, uint64_t size) {
        const auto remote = std::make_shared<const RemoteSource>(std::move(source), path, size);
        const ReleaseGil release;
        return std::const_pointer_cast<CheckpointFile>(CheckpointFile::from_source(remote, check_signals));
      },
      py::arg("source"), py::arg("path"), py::arg("size"),
      "What a server has, by way of an object with ask(); see bindings/remote_source.h.");

  // keep_alive: the file reads from the bytes object, which never moves or changes.
  module.def(
      "from_bytes",
      [](const py::bytes& data) {
        char* start = nullptr;
        Py_ssize_t size = 0;
        if (PyBytes_AsStringAndSize(data.ptr(), &start, &size) != 0) throw py::error_already_set();
        const ReleaseGil release;
        return std::const_pointer_cast<CheckpointFile>(CheckpointFile::from_memory(start, static_cast<uint64_t>(size)));
      },
      py::arg("data"), py::keep_alive<0, 1>());

  module.def("resident_bytes", &resident_bytes, py::arg("path"),
             "Bytes of the file in the page cache, or None where the kernel does not tell.");
}

}  // namespace weightload
