#include "pipeline/host_loader.h"

#include <algorithm>
#include <unordered_set>
#include <utility>

#include "base/error.h"
#include "base/fork_generation.h"
#include "io/page_in.h"
#include "io/residency.h"

namespace weightload {
namespace {

constexpr uint64_t kHostBlockAlignment = 64;  // a cache line

// In a cached file, page tables are filled ahead only where there is enough to do for a thread to pay.
constexpr uint64_t kLeastCachedBytes = 2 << 20;

bool is_aligned(const TensorInfo& tensor) { return tensor.bytes.begin % dtype_alignment(tensor.dtype) == 0; }

}  // namespace

HostLoader::HostLoader(CheckpointFiles files, std::vector<std::vector<uint32_t>> selection,
                       const HostLoaderOptions& options)
    : files_(std::move(files)), fork_generation_(fork_generation()) {
  plan(selection, options);
  refuse_duplicates();
  map_files();
  find_tasks();
  find_waits(options.read_ahead);
  start(options);
}

HostLoader::~HostLoader() {
  close();
  // In a forked child the threads do not exist and the pool's mutex may be held for ever by one of them:
  // neither joining nor destroying is possible. The child keeps the few kilobytes.
  if (forked()) static_cast<void>(pool_.release());
}

bool HostLoader::forked() const { return fork_generation_ != fork_generation(); }

void HostLoader::refuse_duplicates() const {
  if (files_.size() < 2) return;  // within one file the header has been checked
  std::unordered_set<std::string_view> names;
  names.reserve(tensors_.size());
  for (const Tensor& tensor : tensors_) {
    const TensorInfo& info = files_[tensor.file]->header().tensors[tensor.index];
    if (!names.insert(info.name).second) {
      throw Error(ErrorKind::header, "an earlier file of the checkpoint has a tensor of this name too",
                  {files_[tensor.file]->path(), info.name, {}, 0}, rule::kDuplicateTensor);
    }
  }
}

void HostLoader::plan(const std::vector<std::vector<uint32_t>>& selection, const HostLoaderOptions& options) {
  std::vector<TensorExtent> extents;
  for (uint32_t f = 0; f < files_.size(); ++f) {
    const bool can_map = options.map && files_[f]->file();
    for (uint32_t index : selection.at(f)) {
      const TensorInfo& info = files_[f]->header().tensors.at(index);
      tensors_.push_back({f, index});
      extents.push_back({f, info.bytes, dtype_alignment(info.dtype), can_map && is_aligned(info)});
      total_bytes_ += info.bytes.size();
    }
  }
  LayoutOptions layout;
  layout.block_bytes = options.block_bytes;
  layout.block_alignment = kHostBlockAlignment;
  layout.align_every_tensor = false;
  layout_ = plan_layout(extents, layout);

  ReadPlanOptions reads;
  reads.task_bytes = options.task_bytes;
  reads_ = plan_reads(layout_, reads);
  blocks_.resize(layout_.blocks.size());
}

void HostLoader::map_files() {
  maps_.resize(files_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const uint32_t f = tensors_[i].file;
    if (!layout_.blocks[layout_.places[i].block].mapped || maps_[f]) continue;
    maps_[f] = map_file(files_[f]->file()->fd(), files_[f]->size(), files_[f]->path());
  }
}

// Both lists are in the order of blocks and offsets, so one walk over them finds every tensor's tasks.
void HostLoader::find_tasks() {
  uint32_t task = 0;
  last_task_of_file_.resize(files_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const TensorPlace& place = layout_.places[i];
    const uint64_t size = files_[tensors_[i].file]->header().tensors[tensors_[i].index].bytes.size();
    const auto skip_tasks_up_to = [&](uint64_t offset) {
      const auto ends_by = [&](const ReadTask& read) {
        return read.block < place.block ||
               (read.block == place.block && read.block_offset + read.bytes.size() <= offset);
      };
      while (task + 1 < reads_.tasks.size() && ends_by(reads_.tasks[task])) ++task;
    };
    if (size > 0) skip_tasks_up_to(place.block_offset);
    tensors_[i].first_task = task;
    if (size > 0) skip_tasks_up_to(place.block_offset + size - 1);
    tensors_[i].last_task = task;
    last_task_of_file_[tensors_[i].file] = task;
  }
}

void HostLoader::find_waits(bool read_ahead) {
  cached_.assign(files_.size(), false);
  for (size_t f = 0; f < files_.size() && read_ahead; ++f) {
    if (!maps_[f]) continue;
    const ByteRange all{0, files_[f]->size()};
    cached_[f] = cached_bytes(*files_[f]->file(), all).value_or(0) == all.size();
  }
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const bool mapped = layout_.blocks[layout_.places[i].block].mapped;
    const bool empty = files_[tensors_[i].file]->header().tensors[tensors_[i].index].bytes.empty();
    tensors_[i].wait = !empty && (!mapped || (read_ahead && !cached_[tensors_[i].file]));
  }
}

void HostLoader::start(const HostLoaderOptions& options) {
  bool anything_to_wait_for = false;
  for (const Tensor& tensor : tensors_) anything_to_wait_for = anything_to_wait_for || tensor.wait;
  page_in_ = options.read_ahead;
  if (!anything_to_wait_for && (!page_in_ || total_bytes_ < kLeastCachedBytes)) return;
  std::vector<uint64_t> ends;
  ends.reserve(reads_.tasks.size());
  uint64_t total = 0;
  for (const ReadTask& read : reads_.tasks) ends.push_back(total += read.bytes.size());
  if (ends.empty()) return;
  pool_ = std::make_unique<OrderedPool>(std::move(ends), options.threads, options.window_bytes,
                                        [this](size_t task, size_t position) { work(task, position); });
}

// Runs on the pool's threads, from before pool_ is assigned.
void HostLoader::work(size_t task, size_t position) {
  const ReadTask& read = reads_.tasks[task];
  if (!layout_.blocks[read.block].mapped) {
    files_[read.file]->source().read(read.bytes.begin, block_memory(read.block) + read.block_offset, read.bytes.size());
  } else if (page_in_ && task >= position) {
    // Behind the consumer, pages have been touched or never will be.
    page_in(*files_[read.file]->file(), maps_[read.file]->data(), read.bytes, cached_[read.file]);
  }
}

char* HostLoader::block_memory(uint32_t block) {
  std::lock_guard<std::mutex> lock(allocating_);
  HostMemoryRef& memory = blocks_[block];
  if (!memory) {
    try {
      memory = allocate_block(layout_.blocks[block].bytes);
    } catch (const Error& error) {
      const Tensor& first = tensors_[layout_.blocks[block].first_tensor];
      const CheckpointFile& file = *files_[first.file];
      throw Error(error.kind, error.message,
                  {file.path(), file.header().tensors[first.index].name, {}, error.context.error_number});
    }
  }
  return memory->data();
}

// A mapping costs page tables (1/512 of what was touched) for as long as anything holds it; files that the
// consumer and the threads have left behind are held by their tensors alone.
void HostLoader::unmap_passed_files(uint32_t current_file) {
  while (first_mapped_file_ < current_file) {
    const size_t f = first_mapped_file_;
    if (maps_[f] && pool_ && !pool_->is_done(last_task_of_file_[f])) return;
    maps_[f] = {};
    ++first_mapped_file_;
  }
}

HostLoader::Step HostLoader::next(HostTensor& tensor, std::chrono::milliseconds patience) {
  if (next_ == tensors_.size() || interrupted_) return Step::end;
  if (forked())
    throw Error(ErrorKind::usage, "this load was begun before fork(); its threads are in the parent process only");
  const Tensor& wanted = tensors_[next_];
  const TensorPlace& place = layout_.places[next_];
  const Block& block = layout_.blocks[place.block];
  if (pool_) {
    pool_->advance(wanted.first_task, wanted.last_task);
    if (wanted.wait && !pool_->wait(wanted.last_task, patience)) return Step::not_ready;
  }
  if (wanted.file > first_mapped_file_) unmap_passed_files(wanted.file);
  tensor.file = files_[wanted.file].get();
  tensor.info = &tensor.file->header().tensors[wanted.index];
  if (tensor.info->bytes.empty()) {
    tensor.data = nullptr;
    tensor.memory = {};
  } else if (block.mapped) {
    tensor.memory = maps_[wanted.file];
    tensor.data = tensor.memory->data() + tensor.info->bytes.begin;
  } else {
    tensor.memory = blocks_[place.block];
    tensor.data = tensor.memory->data() + place.block_offset;
  }
  ++next_;
  // The last tensor of a private block takes the loader's own reference with it.
  if (next_ == block.last_tensor) blocks_[place.block] = {};
  return Step::tensor;
}

void HostLoader::interrupt() noexcept {
  interrupted_ = true;
  if (pool_ && !forked()) pool_->stop();
}

void HostLoader::close() noexcept {
  interrupted_ = true;
  if (pool_ && !forked()) pool_->join();
  blocks_.clear();
  maps_.clear();
  files_.clear();
}

}  // namespace weightload
