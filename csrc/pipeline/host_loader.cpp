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

// A mapped load of less than this whose files are in the page cache is left to page faults: they cost less than the
// start of a thread.
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
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (!names.insert(info(i).name).second) {
      throw Error(ErrorKind::header, "an earlier file of the checkpoint has a tensor of this name too",
                  {files_[tensors_[i].file]->path(), info(i).name, {}, 0}, rule::kDuplicateTensor);
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

  // A load's peak is its largest block and a window. Keeping as much for reuse does not raise it.
  uint64_t largest = options.window_bytes;
  for (const Block& block : layout_.blocks) largest = std::max(largest, block.mapped ? 0 : block.bytes + kHugePage);
  block_cache_ = std::make_shared<BlockCache>(largest);
}

const TensorInfo& HostLoader::info(size_t tensor) const {
  return files_[tensors_[tensor].file]->header().tensors[tensors_[tensor].index];
}

bool HostLoader::all_cached() const {
  for (const auto& file : files_) {
    if (!file->file() || cached_bytes(*file->file(), {0, file->size()}) != file->size()) return false;
  }
  return true;
}

void HostLoader::map_files() {
  maps_.resize(files_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const uint32_t f = tensors_[i].file;
    const File* file = files_[f]->file();
    if (maps_[f] || !file) continue;
    try {
      maps_[f] = map_file(file->fd(), file->size(), file->path());
    } catch (const Error&) {
      // Private memory is read through the page cache, which a mapping fills best, but it can do without: under a
      // limit of the address space, or on a file system that cannot map.
      if (layout_.blocks[layout_.places[i].block].mapped) throw;
    }
  }
}

// Finds the task that holds each tensor's last byte. Both lists are in the order of blocks and offsets.
void HostLoader::find_tasks() {
  uint32_t task = 0;
  last_task_of_file_.resize(files_.size());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const TensorPlace& place = layout_.places[i];
    const uint64_t end = place.block_offset + info(i).bytes.size();
    const auto ends_before = [&](const ReadTask& read) {
      return read.block < place.block || (read.block == place.block && read.block_offset + read.bytes.size() < end);
    };
    if (!info(i).bytes.empty()) {
      while (ends_before(reads_.tasks[task])) ++task;
    }
    tensors_[i].last_task = task;
    last_task_of_file_[tensors_[i].file] = task;
  }
}

void HostLoader::start(const HostLoaderOptions& options) {
  bool any_private = false;
  for (const Block& block : layout_.blocks) any_private = any_private || !block.mapped;
  page_in_ = options.read_ahead && (any_private || total_bytes_ >= kLeastCachedBytes || !all_cached());
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const bool mapped = layout_.blocks[layout_.places[i].block].mapped;
    tensors_[i].wait = !info(i).bytes.empty() && (!mapped || page_in_);
  }
  if (reads_.tasks.empty() || !(any_private || page_in_)) return;

  std::vector<uint64_t> ends;
  ends.reserve(reads_.tasks.size());
  uint64_t total = 0;
  for (const ReadTask& read : reads_.tasks) ends.push_back(total += read.bytes.size());
  pool_ = std::make_unique<OrderedPool>(std::move(ends), options.threads, options.window_bytes,
                                        [this](size_t task) { work(task); });
}

// Runs on the pool's threads, from before pool_ is assigned.
void HostLoader::work(size_t task) {
  const ReadTask& read = reads_.tasks[task];
  const CheckpointFile& file = *files_[read.file];
  char* const mapping = maps_[read.file] ? maps_[read.file]->data() : nullptr;
  if (layout_.blocks[read.block].mapped) {
    if (page_in_) page_in(*file.file(), mapping, read.bytes);
    return;
  }
  if (mapping) fill_page_cache(*file.file(), mapping, read.bytes);
  file.source().read(read.bytes.begin, block_memory(read.block) + read.block_offset, read.bytes.size());
}

char* HostLoader::block_memory(uint32_t block) {
  std::lock_guard<std::mutex> lock(allocating_);
  HostMemoryRef& memory = blocks_[block];
  if (!memory) {
    try {
      memory = block_cache_->allocate(layout_.blocks[block].bytes);
    } catch (const Error& error) {
      const uint32_t first = layout_.blocks[block].first_tensor;
      throw Error(error.kind, error.message,
                  {files_[tensors_[first].file]->path(), info(first).name, {}, error.context.error_number});
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

// Waits for a task, and adds to a reading thread's error the tensor that it hit: threads know bytes only.
bool HostLoader::wait(size_t task, std::chrono::milliseconds patience) {
  try {
    return pool_->wait(task, patience);
  } catch (const Error& error) {
    ErrorContext where = error.context;
    for (size_t i = next_; i < tensors_.size() && where.offset && where.tensor.empty(); ++i) {
      const bool here = info(i).bytes.begin <= *where.offset && *where.offset < info(i).bytes.end;
      if (here && files_[tensors_[i].file]->path() == where.path) where.tensor = info(i).name;
    }
    throw Error(error.kind, error.message, where, error.rule);
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
    pool_->advance(wanted.last_task);
    if (wanted.wait && !wait(wanted.last_task, patience)) return Step::not_ready;
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
  block_cache_->close();
  maps_.clear();
  files_.clear();
}

}  // namespace weightload
