#include "bindings/load_counts.h"

namespace py = pybind11;

namespace weightload {

py::dict load_counts(const LoadCounts& counts) {
  py::list files;
  for (const FileCounts& file : counts.files) {
    py::dict entry;
    entry["mapped_bytes"] = file.mapped_bytes.load();
    entry["buffered_bytes"] = file.buffered_bytes.load();
    entry["direct_bytes"] = file.direct_bytes.load();
    entry["rounded_bytes"] = file.rounded_bytes.load();
    entry["wanted_bytes"] = file.wanted_bytes.load();
    entry["read_s"] = in_seconds(file.read_ns);
    files.append(entry);
  }
  const std::chrono::duration<double> begun = counts.begin.time_since_epoch();
  py::dict result;
  result["files"] = files;
  result["tensors"] = counts.tensors.load();
  result["tensor_bytes"] = counts.tensor_bytes.load();
  result["threads"] = counts.threads;
  result["begun_s"] = begun.count();
  result["made_s"] = static_cast<double>(counts.made_ns) * 1e-9;
  result["reading_s"] = static_cast<double>(counts.last_read_ns - counts.first_read_ns) * 1e-9;
  result["lasted_s"] = in_seconds(counts.lasted_ns());
  result["ended"] = counts.ended();
  result["wait_s"] = in_seconds(counts.wait_ns);
  result["shared_s"] = in_seconds(counts.shared_ns);
  return result;
}

}  // namespace weightload
