#include "load/host_loader.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/error.h"
#include "base/pages.h"
#include "checkpoint/cached_reads.h"
#include "page_cache/free_page_reporting.h"
#include "page_cache/page_in.h"
#include "read/strided_reads.h"

namespace weightload {
namespace {

constexpr uint64_t kHostBlockAlignment = 64;  // a cache line

// A mapped load of less than this whose files are in the page cache is left to page faults: they cost less than the
// start of a thread.
constexpr uint64_t kLeastCachedBytes = 2 << 20;

// Of a load that copies past the processor's caches: less is copied in the time that it takes to find out where that
// may be done.
constexpr uint64_t kLeastPastCaches = 16 << 20;

// Where free memory is reported to a host, huge pages of the page cache are cheap as long as they are those that
// somebody has just freed, and then cost more than the storage. A load of less than this is over before it has learnt
// that.
constexpr uint64_t kLeastToLearn = 1 << 30;

// How long a mapped file that was found unchanged is taken to be so.
constexpr auto kUnchangedFor = std::chrono::microseconds(20);

}  // namespace

HostLoader::HostLoader(CheckpointFiles files, const std::vector<std::vector<uint32_t>>& selection,
                       std::vector<HostMemoryRef> places, std::shared_ptr<GroupExchange> exchange,
                       const HostLoaderOptions& options, const WantedParts& parts)
    : Loader(std::move(files), selection, parts, std::move(exchange), std::max(options.threads, options.cold_threads)),
      readiness_(selected_.size()),
      read_(shared_ || !DirectFile::suits_private_memory() ? ReadMode::buffered : options.read) {
  map_files(places, options);
  leave_taps();
  plan(std::move(places), options);
  find_tasks();
  shared_.begin(layout_, [this](auto&&... block) { return prepare(block...); }, selected_.files());
  start_reading(options);
  counts_.made();
}

HostLoader::~HostLoader() { close(); }

// Whether a tensor, or the part of it that is wanted, can be a view of its mapped file.
bool HostLoader::can_view(size_t tensor) const {
  const TensorInfo& info = selected_.info(tensor);
  return info.bytes.begin % dtype_alignment(info.dtype) == 0 && selected_.runs(tensor) == nullptr;
}

void HostLoader::plan(std::vector<HostMemoryRef> places, const HostLoaderOptions& options) {
  std::vector<TensorExtent> extents;
  extents.reserve(selected_.size());
  for (size_t i = 0; i < selected_.size(); ++i) {
    const TensorInfo& info = selected_.info(i);
    const bool alone = !places.empty() && places.at(i);
    const bool mapped = held_[selected_.file_index(i)].map && can_view(i) && !alone;
    extents.push_back(
        {selected_.file_index(i), info.bytes, dtype_alignment(info.dtype), mapped, alone, selected_.runs(i)});
  }
  LayoutOptions layout;
  layout.block_bytes = options.block_bytes;
  layout.block_alignment = kHostBlockAlignment;
  layout.align_every_tensor = false;
  if (read_ != ReadMode::buffered) layout.direct_alignment = kDirectAlignment;
  layout_ = plan_layout(extents, layout);

  reads_ = plan_reads(layout_, shared_.reads(options.task_bytes));
  blocks_.resize(layout_.blocks.size());
  for (size_t i = 0; i < places.size(); ++i) {
    if (!places[i]) continue;
    if (places[i]->size() < selected_.info(i).bytes.size()) {
      throw selected_.for_tensor(Error(ErrorKind::usage, "the memory to load the tensor into is smaller than it"), i);
    }
    blocks_[layout_.places[i].block] = {std::move(places[i]), true};
  }

  // A load's peak is its largest block and a window. Keeping as much for reuse does not raise it.
  uint64_t largest = options.window_bytes;
  for (size_t b = 0; b < blocks_.size(); ++b) {
    const Block& block = layout_.blocks[b];
    if (!block.mapped && !blocks_[b].in_place) largest = std::max(largest, block.bytes + kHugePage);
  }
  block_cache_ = std::make_shared<BlockCache>(largest);
}

void HostLoader::map_files(const std::vector<HostMemoryRef>& places, const HostLoaderOptions& options) {
  if (!options.map || shared_) return;
  std::vector<bool> tried(selected_.files().size());
  for (size_t i = 0; i < selected_.size(); ++i) {
    const uint32_t f = selected_.file_index(i);
    const CheckpointFile& file = *selected_.file(i);
    const bool alone = !places.empty() && places.at(i);
    if (tried[f] || f >= options.most_maps || alone || !file.can_map() || !can_view(i)) continue;
    tried[f] = true;
    try {
      // Who needs views is a caller that may write to them; who only prefers them copies from them.
      const bool only_copied = !places.empty() && !options.must_map;
      held_[f].map = map_file(file.file()->descriptor().get(), file.size(), file.path(),
                              only_copied ? Access::read : Access::write);
    } catch (const Error&) {
      if (options.must_map) throw;
    }
  }
}

// Finds the task that holds each tensor's last byte. Both lists are in the order of blocks and offsets.
void HostLoader::find_tasks() {
  if (shared_) return;  // whole blocks count, not tensors
  uint32_t task = 0;
  for (size_t i = 0; i < selected_.size(); ++i) {
    const TensorPlace& place = layout_.places[i];
    const ByteRange bytes = selected_.info(i).bytes;
    const uint64_t end = place.block_offset + bytes.size();
    const auto ends_before = [&](const ReadTask& read) {
      return read.block < place.block || (read.block == place.block && read.block_offset + read.bytes.size() < end);
    };
    if (!bytes.empty()) {
      while (ends_before(reads_.tasks[task])) ++task;
    }
    readiness_[i].last_task = task;
  }
}

void HostLoader::start_reading(const HostLoaderOptions& options) {
  bool any_private = false;
  bool any_mapped = false;
  for (const Block& block : layout_.blocks) (block.mapped ? any_mapped : any_private) = true;
  page_in_ = options.read_ahead;
  if (page_in_ && !any_private && total_bytes() < kLeastCachedBytes) {
    const std::optional<bool> cached = all_cached(selected_, maps(), reads_);
    // What seems to be in the page cache is mapped in this thread, for the same reason.
    page_in_ = !cached.value_or(!cached && looks_cached(selected_, maps(), reads_) && map_here());
  }
  for (size_t i = 0; i < selected_.size(); ++i) {
    const bool mapped = layout_.blocks[layout_.places[i].block].mapped;
    readiness_[i].wait = !selected_.info(i).bytes.empty() && (!mapped || page_in_);
  }
  if (reads_.tasks.empty() || !(any_private || page_in_)) return;
  if (any_mapped && page_in_) page_tables_.emplace();
  if (any_mapped && total_bytes() < kLeastToLearn && free_pages_are_reported()) filler_.prices().settle(Pages::single);
  const bool from_storage = (any_private && read_ == ReadMode::direct) || !looks_cached(selected_, maps(), reads_);
  for (const ReadTask& read : reads_.tasks) {
    if (layout_.blocks[read.block].mapped) continue;
    open_reader(read.file, from_storage ? read_ : ReadMode::buffered, ReadInto::pageable);
  }
  const unsigned threads = from_storage ? std::max(options.threads, options.cold_threads) : options.threads;
  start(
      reads_.tasks, threads_of(threads, options.threads_at_first), shared_.own_part(options.window_bytes),
      [this](size_t task, const Look& look) { work(task, look); }, options.pause);
}

// Whether all pages that will be read could be mapped; if not the threads find out what is wrong.
bool HostLoader::map_here() {
  const PageTables tables;
  return std::all_of(reads_.tasks.begin(), reads_.tasks.end(), [&](const ReadTask& read) {
    const ByteRange pages = pages_around(read.bytes);
    char* const mapping = held_[read.file].map->data();
    bool was_read;
    return tables.map_unknown(mapping + pages.begin, mapping + pages.end, was_read) == 0;
  });
}

// Runs on the pool's threads, from before pool_ is assigned.
void HostLoader::work(size_t task, const Look& look) {
  const ReadTask& read = reads_.tasks[task];
  const CheckpointFile& file = *selected_.files()[read.file];
  if (layout_.blocks[read.block].mapped && !page_in_) return;
  const LoadCounts::Read watch(counts_, read.file);
  if (layout_.blocks[read.block].mapped) {
    page_in(*file.file(), held_[read.file].map->data(), read.bytes, *page_tables_, *pace_, filler_.prices(), look);
    file.source().require_unchanged(read.bytes.begin);
    counts_.files[read.file].mapped_bytes += read.bytes.size();
    counts_.was_read(read.file, read.bytes.size());
    return;
  }
  const HostMemoryRef memory = block_memory(read.block);
  // The caller's memory is mostly in single pages.
  const bool in_place = blocks_[read.block].in_place;
  const Destination to{*memory.get(), memory->data() + read.block_offset, !in_place && memory->in_huge_pages(),
                       in_place};
  if (read.piece != 0) {
    const bool past_caches = may_pass_caches(to.begin, read.bytes.size());
    if (!past_caches) fault_in(to, to.begin, read.bytes.size(), look);
    read_strided(*held_[read.file].reader, read.run(), to.begin, look, past_caches);
  } else {
    read_private(*held_[read.file].reader, read.bytes, to, look);
  }
  counts_.was_read(read.file, read.bytes.size());
  file.source().require_unchanged(read.bytes.begin);
}

void HostLoader::read_private(RangeReader& reader, ByteRange range, const Destination& to, const Look& look) {
  const bool fits = DirectFile::fits(range, to.begin) && (to.huge || range.size() < kHugePage);
  const bool bounced = !fits && range.size() >= kHugePage;
  RangeReader::Attempt attempt = reader.begin(range, look, fits || bounced);
  uint64_t done = range.begin;
  if (attempt.direct && fits) {
    fault_in(to, to.begin, range.size(), look);
    reader.direct_within(attempt, to.begin);
  } else if (attempt.direct) {
    done = read_bounced(reader, attempt, to);
  }
  if (!attempt.direct) read_buffered(reader, attempt, done, to);
  reader.end(attempt);
}

// Whether what is written there had better go past the processor's caches. Not what goes to other ranks next.
bool HostLoader::may_pass_caches(const char* place, uint64_t size) {
  return !shared_ && total_bytes() >= kLeastPastCaches && backed_pages_.has_all(place, static_cast<size_t>(size));
}

// With a look between two windows: each may wait for the system to find memory. A small load into the caller's memory
// is done in the time that looking for its pages takes.
void HostLoader::fault_in(const Destination& to, char* begin, uint64_t size, const Look& look) {
  if (to.in_place && total_bytes() < kLeastPastCaches) return;
  for (char *at = begin, *const end = begin + size; at < end;) {
    look();
    const size_t window = kHugePage - reinterpret_cast<uintptr_t>(at) % kHugePage;
    const size_t count = std::min(window, static_cast<size_t>(end - at));
    if (to.in_place) {
      fresh_pages_.fault_in(at, count, to.memory.data(), to.memory.size());
    } else {
      to.memory.fault_in(at, count);
    }
    at += count;
  }
}

// By way of a bounce buffer, one huge page, for memory that is in single pages, or is out of step with its file: a copy
// of what was read directly costs less than filling the page cache. Returns the end of what was read.
uint64_t HostLoader::read_bounced(RangeReader& reader, RangeReader::Attempt& attempt, const Destination& to) {
  HostMemoryRef block;
  try {
    block = block_cache_->allocate_huge(kHugePage);
  } catch (const Error&) {  // it can do without
    attempt.direct = attempt.timed = false;
    return attempt.range.begin;
  }
  const auto place_of = [&](uint64_t at) { return to.begin + (at - attempt.range.begin); };
  for (uint64_t at = attempt.range.begin; at < attempt.range.end;) {
    const uint64_t most = kHugePage - 2 * kDirectAlignment;  // and a disk block at both ends
    const ByteRange piece{at, std::min(attempt.range.end, round_down(at, kDirectAlignment) + most)};
    char* const image = block->data() + at % kDirectAlignment;
    if (!reader.direct(attempt, piece, image)) return at;
    const auto size = static_cast<size_t>(piece.size());
    fault_in(to, place_of(at), size, attempt.look);
    std::memcpy(place_of(at), image, size);
    at = piece.end;
  }
  return attempt.range.end;
}

// What is in the page cache is read window by window, each written to while the kernel's zeros in it are still in a
// processor's cache.
void HostLoader::read_buffered(RangeReader& reader, RangeReader::Attempt& attempt, uint64_t from,
                               const Destination& to) {
  const ByteRange range = attempt.range;
  for (uint64_t at = from; at < range.end;) {
    char* const place = to.begin + (at - range.begin);
    const uint64_t window = kHugePage - reinterpret_cast<uintptr_t>(place) % kHugePage;
    const ByteRange piece{at, attempt.cached ? std::min(range.end, at + window) : range.end};
    const bool past_caches = may_pass_caches(place, piece.size());
    if (!past_caches) fault_in(to, place, piece.size(), attempt.look);
    reader.buffered(attempt, piece, place, past_caches);
    at = piece.end;
  }
}

// What only helps the reading is given up before memory for tensors is refused.
HostMemoryRef HostLoader::allocate(uint64_t bytes) {
  try {
    return block_cache_->allocate(bytes);
  } catch (const Error&) {
    mappings_.give_up();
    block_cache_->release();  // to the spare memory, which goes before the system's refusal is believed
  }
  return block_cache_->allocate(bytes);
}

HostMemoryRef HostLoader::block_memory(uint32_t block) {
  std::lock_guard<std::mutex> lock(allocating_);
  HostMemoryRef& memory = blocks_[block].memory;
  if (!memory) {
    try {
      memory = allocate(shared_.buffer(layout_.blocks[block].bytes));
    } catch (const Error& error) {
      throw selected_.for_tensor(error, layout_.blocks[block].first_tensor);
    }
  }
  return memory;
}

// GroupExchange::Prepare: the block is ready when this rank's reads of it are done.
bool HostLoader::prepare(uint32_t block, std::chrono::milliseconds patience, Payload& payload) {
  const uint32_t first = block == 0 ? 0 : reads_.block_ends[block - 1];
  const uint32_t last = reads_.block_ends[block];
  if (first < last && !await_task(last - 1, layout_.blocks[block].first_tensor, patience)) return false;
  payload.host = block_memory(block);
  payload.bytes = shared_.buffer(layout_.blocks[block].bytes);
  return true;
}

// A view of what is gone from the file would end the process when it is touched. Asking for every tensor (0.3 us) would
// show at twenty thousand, so those that follow at once go by the last answer. Who has no patience does not ask where
// that may wait: false.
bool HostLoader::require_unchanged(std::chrono::milliseconds patience) {
  const uint32_t file = selected_.file_index(next_);
  const auto now = std::chrono::steady_clock::now();
  if (file == unchanged_file_ && now - unchanged_at_ < kUnchangedFor) return true;
  const File* const asked = selected_.file(next_)->file();
  if (patience.count() == 0 && asked && asked->may_wait()) return false;
  try {
    selected_.file(next_)->source().require_unchanged(selected_.info(next_).bytes.begin);
  } catch (const Error& error) {
    throw selected_.name_tensor(error, next_);
  }
  unchanged_file_ = file;
  unchanged_at_ = now;
  return true;
}

HostLoader::Step HostLoader::next(HostTensor& tensor, std::chrono::milliseconds patience) {
  if (next_ == selected_.size() || interrupted_) return Step::end;
  require_process();
  const Readiness& wanted = readiness_[next_];
  const ByteRange bytes = selected_.info(next_).bytes;
  const TensorPlace& place = layout_.places[next_];
  const Block& block = layout_.blocks[place.block];
  BlockState& state = blocks_[place.block];
  if (shared_) {
    if (!shared_.complete(place.block, patience, counts_.shared_ns)) return no_tensor();
  } else if (pool_ && !wanted.wait) {
    pool_->advance(wanted.last_task);
  } else if (pool_ && !await_task(wanted.last_task, next_, patience)) {
    return no_tensor();
  }
  const bool is_view = block.mapped && !bytes.empty() && !state.in_place;
  if (is_view && !require_unchanged(patience)) return Step::not_ready;
  tensor.in_place = state.in_place;
  if (bytes.empty() || state.in_place) {
    tensor.data = nullptr;
    tensor.memory = {};
  } else if (block.mapped) {
    tensor.memory = held_[selected_.file_index(next_)].map;
    tensor.data = tensor.memory->data() + bytes.begin;
  } else {
    tensor.memory = state.memory;
    tensor.data = tensor.memory->data() + place.block_offset;
  }
  hand_out(tensor);
  // The last tensor of a private block takes the loader's own reference with it.
  if (next_ == block.last_tensor) state.memory = {};
  return Step::tensor;
}

void HostLoader::close() noexcept {
  stop();
  end();
  page_tables_.reset();
  backed_pages_.close();
  blocks_.clear();
  block_cache_->close();
}

}  // namespace weightload
