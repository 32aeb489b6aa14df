#include "checkpoint/cached_reads.h"

#include <algorithm>

#include "page_cache/residency.h"

namespace weightload {
namespace {

// Of more ranges it is cheaper to ask of whole files.
constexpr size_t kMostRangesToAskOf = 256;

constexpr size_t kSamples = 16;
constexpr uint64_t kSampleBytes = 64 << 10;

}  // namespace

// Asked of mincore: to cachestat a page that could not be read is as good as any other, and touching it is a SIGBUS.
std::optional<bool> all_cached(const SelectedTensors& selected, const std::vector<char*>& maps, const ReadPlan& plan) {
  const CheckpointFiles& files = selected.files();
  const bool by_task = plan.tasks.size() <= kMostRangesToAskOf;
  const size_t count = by_task ? plan.tasks.size() : files.size();
  for (size_t i = 0; i < count; ++i) {
    const size_t f = by_task ? plan.tasks[i].file : i;
    const ByteRange range = by_task ? plan.tasks[i].bytes : ByteRange{0, files[f]->size()};
    if (!maps[f]) return false;
    const std::optional<uint64_t> cached = cached_bytes_by_mincore(*files[f]->file(), range, maps[f]);
    if (!cached) return std::nullopt;
    if (*cached != range.size()) return false;
  }
  return true;
}

bool looks_cached(const SelectedTensors& selected, const std::vector<char*>& maps, const ReadPlan& plan) {
  const size_t step = std::max<size_t>(1, plan.tasks.size() / kSamples);
  for (size_t t = 0; t < plan.tasks.size(); t += step) {
    const ReadTask& task = plan.tasks[t];
    const ByteRange sample{task.bytes.begin, std::min(task.bytes.end, task.bytes.begin + kSampleBytes)};
    const File* const file = selected.files()[task.file]->file();
    if (!file || !seems_cached(*file, sample, maps[task.file]).value_or(false)) return false;
  }
  return true;
}

}  // namespace weightload
