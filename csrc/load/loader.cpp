#include "load/loader.h"

#include <algorithm>

#include "base/error.h"
#include "base/stopwatch.h"

namespace weightload {

Loader::Loader(CheckpointFiles files, const std::vector<std::vector<uint32_t>>& selection, const WantedParts& parts,
               std::shared_ptr<GroupExchange> exchange, unsigned readers)
    : shared_(std::move(exchange)),
      selected_(std::move(files), selection, parts),
      counts_(selected_.files().size()),
      pace_(new Pace(std::max(readers, 1u))),
      held_(selected_.files().size()) {}

bool Loader::needs_others() const {
  return shared_ && next_ < selected_.size() && !shared_.is_complete(layout_.places[next_].block);
}

std::vector<char*> Loader::maps() const {
  std::vector<char*> begins;
  begins.reserve(held_.size());
  for (const HeldFile& file : held_) begins.push_back(file.map ? file.map->data() : nullptr);
  return begins;
}

void Loader::open_reader(uint32_t file, ReadMode mode, ReadInto memory) {
  std::unique_ptr<RangeReader>& reader = held_[file].reader;
  if (reader) return;
  const CheckpointFile& opened = *selected_.files()[file];
  const ByteTap* const tap = held_[file].is_left ? nullptr : opened.tap();
  if (held_[file].is_left || opened.is_also_read_by_others()) mode = ReadMode::buffered;
  reader = std::make_unique<RangeReader>(opened.source(), opened.file(), tap, mode, memory, counts_.files[file],
                                         opened.file() ? *pace_ : unpaced_, filler_, mappings_);
}

void Loader::leave_taps() {
  const CheckpointFiles& files = selected_.files();
  if (std::none_of(files.begin(), files.end(), [](const auto& file) { return file->tap() != nullptr; })) return;
  std::vector<bool> has_parts(held_.size());
  for (size_t i = 0; i < selected_.size(); ++i) {
    if (selected_.runs(i)) has_parts[selected_.file_index(i)] = true;
  }
  for (size_t f = 0; f < held_.size(); ++f) {
    const ByteTap* const tap = files[f]->tap();
    if (!tap || !(shared_ || held_[f].map || has_parts[f])) continue;
    held_[f].is_left = true;
    tap->leave();
  }
}

void Loader::require_process() const {
  if (forked())
    throw Error(ErrorKind::usage, "this load was begun before fork(); its threads are in the parent process only");
}

bool Loader::await_task(size_t task, size_t first_tensor, std::chrono::milliseconds patience) {
  pool_->advance(task);
  if (pool_->is_done(task)) return true;
  Stopwatch watch(counts_.wait_ns);
  try {
    return pool_->wait(task, patience);
  } catch (const Error& error) {
    if (interrupted_) return false;  // the threads were stopped: nothing has failed that others should hear of
    throw selected_.name_tensor(error, first_tensor);
  }
}

void Loader::hand_out(LoadedTensor& tensor) {
  const uint32_t file = selected_.file_index(next_);
  if (file > first_held_file_) let_go_of_passed_files(file);
  tensor.file = selected_.file(next_);
  tensor.info = &selected_.info(next_);
  ++next_;
  counts_.deliver(tensor.info->bytes.size());
  if (next_ == selected_.size()) counts_.end();
}

// A mapping costs page tables (1/512 of what was touched) for as long as anything holds it, and a reader a descriptor;
// files that the consumer and the threads have left behind are held by their tensors alone.
void Loader::let_go_of_passed_files(uint32_t current_file) {
  for (; first_held_file_ < current_file; ++first_held_file_) {
    HeldFile& file = held_[first_held_file_];
    if (pool_ && !pool_->is_done(file.last_task)) return;
    file.reader = {};
    file.map = {};
  }
}

void Loader::stop() noexcept {
  interrupted_ = true;
  if (forked()) return;
  if (pool_) pool_->stop();
  pace_->stop();
}

void Loader::end() noexcept {
  if (pool_ && !forked()) pool_->join();
  shared_.leave();
  counts_.end();
  held_.clear();
  selected_.close();
}

}  // namespace weightload
