#include "pipeline/cached_reads.h"

#include <algorithm>
#include <memory>

#include "base/error.h"
#include "io/file_system.h"
#include "io/residency.h"

namespace weightload {
namespace {

// Of more ranges it is cheaper to ask of whole files.
constexpr size_t kMostRangesToAskOf = 256;

constexpr size_t kSamples = 16;
constexpr uint64_t kSampleBytes = 64 << 10;

// Of look_cached().
constexpr size_t kFilesLookedAt = 4;
constexpr uint64_t kLooksAFile = 4;

char* mapping_of(const HostMemoryRef& map) { return map ? map->data() : nullptr; }

}  // namespace

// Asked of mincore: to cachestat a page that could not be read is as good as any other, and touching it is a SIGBUS.
std::optional<bool> all_cached(const SelectedTensors& selected, const std::vector<HostMemoryRef>& maps,
                               const ReadPlan& plan) {
  const CheckpointFiles& files = selected.files();
  const bool by_task = plan.tasks.size() <= kMostRangesToAskOf;
  const size_t count = by_task ? plan.tasks.size() : files.size();
  for (size_t i = 0; i < count; ++i) {
    const size_t f = by_task ? plan.tasks[i].file : i;
    const ByteRange range = by_task ? plan.tasks[i].bytes : ByteRange{0, files[f]->size()};
    if (!maps[f]) return false;
    const std::optional<uint64_t> cached = cached_bytes_by_mincore(*files[f]->file(), range, maps[f]->data());
    if (!cached) return std::nullopt;
    if (*cached != range.size()) return false;
  }
  return true;
}

bool looks_cached(const SelectedTensors& selected, const std::vector<HostMemoryRef>& maps, const ReadPlan& plan) {
  const size_t step = std::max<size_t>(1, plan.tasks.size() / kSamples);
  for (size_t t = 0; t < plan.tasks.size(); t += step) {
    const ReadTask& task = plan.tasks[t];
    const ByteRange sample{task.bytes.begin, std::min(task.bytes.end, task.bytes.begin + kSampleBytes)};
    const File* const file = selected.files()[task.file]->file();
    if (!file || !seems_cached(*file, sample, mapping_of(maps[task.file])).value_or(false)) return false;
  }
  return true;
}

bool look_cached(const std::vector<std::string>& paths, const std::function<void()>& pause) {
  const size_t files = std::min(paths.size(), kFilesLookedAt);
  for (size_t i = 0; i < files; ++i) {
    std::shared_ptr<const File> file;
    try {
      file = File::open(paths[i * paths.size() / files], pause);
    } catch (const Error&) {
      return false;
    }
    // Not at the header: whoever looked at that has brought in what follows.
    for (uint64_t look = 1; look <= kLooksAFile; ++look) {
      const uint64_t begin = file->size() / kLooksAFile * look - std::min(file->size() / kLooksAFile, kSampleBytes);
      const ByteRange sample{begin, std::min(file->size(), begin + kSampleBytes)};
      if (sample.empty()) continue;
      if (storage_of(*file) != Storage::memory && !seems_cached(*file, sample).value_or(false)) return false;
    }
  }
  return true;
}

}  // namespace weightload
