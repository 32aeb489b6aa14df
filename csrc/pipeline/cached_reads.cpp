#include "pipeline/cached_reads.h"

#include <algorithm>

#include "io/residency.h"

namespace weightload {
namespace {

// Of more ranges it is cheaper to ask of whole files.
constexpr size_t kMostRangesToAskOf = 256;

constexpr size_t kSamples = 16;
constexpr uint64_t kSampleBytes = 64 << 10;

bool is_cached(const CheckpointFile& file, const HostMemoryRef& map, ByteRange range) {
  return file.file() && cached_bytes(*file.file(), range, map ? map->data() : nullptr) == range.size();
}

// To cachestat a page that could not be read is as good as any other, and touching it is a SIGBUS.
bool may_be_touched(const CheckpointFile& file, const HostMemoryRef& map, ByteRange range) {
  return map && cached_bytes_by_mincore(*file.file(), range, map->data()) == range.size();
}

}  // namespace

bool all_cached(const SelectedTensors& selected, const std::vector<HostMemoryRef>& maps, const ReadPlan& plan) {
  const CheckpointFiles& files = selected.files();
  if (plan.tasks.size() <= kMostRangesToAskOf) {
    return std::all_of(plan.tasks.begin(), plan.tasks.end(), [&](const ReadTask& task) {
      return may_be_touched(*files[task.file], maps[task.file], task.bytes);
    });
  }
  for (size_t f = 0; f < files.size(); ++f) {
    if (!may_be_touched(*files[f], maps[f], {0, files[f]->size()})) return false;
  }
  return true;
}

bool looks_cached(const SelectedTensors& selected, const std::vector<HostMemoryRef>& maps, const ReadPlan& plan) {
  const size_t step = std::max<size_t>(1, plan.tasks.size() / kSamples);
  for (size_t t = 0; t < plan.tasks.size(); t += step) {
    const ReadTask& task = plan.tasks[t];
    const ByteRange sample{task.bytes.begin, std::min(task.bytes.end, task.bytes.begin + kSampleBytes)};
    if (!is_cached(*selected.files()[task.file], maps[task.file], sample)) return false;
  }
  return true;
}

}  // namespace weightload
