#include "load/device_loader.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <utility>

#include "base/error.h"
#include "base/fork_generation.h"
#include "base/stopwatch.h"
#include "checkpoint/cached_reads.h"
#include "read/strided_reads.h"

namespace weightload {
namespace {

// Moves pieces that lie as in the file to where the image has them: never to the left, so the last goes first.
void spread(char* image, uint64_t file_begin, const SlotPiece* first, const SlotPiece* last) {
  for (const SlotPiece* piece = last; piece-- != first;) {
    const uint64_t read_at = piece->bytes.begin - file_begin;
    if (read_at != piece->image_offset) std::memmove(image + piece->image_offset, image + read_at, piece->bytes.size());
  }
}

}  // namespace

DeviceLoader::DeviceLoader(std::shared_ptr<Device> device, std::shared_ptr<PinnedRing> ring, CheckpointFiles files,
                           const std::vector<std::vector<uint32_t>>& selection, std::vector<DeviceBlockRef> places,
                           std::shared_ptr<GroupExchange> exchange, const DeviceLoaderOptions& options,
                           const WantedParts& parts)
    : device_(std::move(device)),
      ring_(std::move(ring)),
      shared_(std::move(exchange)),
      selected_(std::move(files), selection, parts),
      counts_(selected_.files().size()),
      pace_(new Pace(std::max(options.threads, 1u))),
      fork_generation_(fork_generation()) {
  plan(std::move(places), options);
  open_readers(options.read);
  start(options);
  const auto ready = [this](size_t block, std::chrono::milliseconds patience, Payload& payload) {
    return prepare(static_cast<uint32_t>(block), patience, payload);
  };
  shared_.begin(layout_, ready, selected_.files());
  counts_.made();
}

DeviceLoader::~DeviceLoader() {
  if (forked()) {
    // Neither the threads nor the device's driver came along: nothing can be joined, waited for or freed. In place of
    // what the parent's threads may wait on: destroying that waits for them.
    new (&allocated_) std::condition_variable;
    new std::vector<DeviceBlockRef>(std::move(blocks_));
    return;
  }
  close();
}

bool DeviceLoader::needs_others() const {
  return shared_ && next_ < selected_.size() && !shared_.is_complete(layout_.places[next_].block);
}

bool DeviceLoader::forked() const { return fork_generation_ != fork_generation(); }

void DeviceLoader::plan(std::vector<DeviceBlockRef> places, const DeviceLoaderOptions& options) {
  std::vector<TensorExtent> extents;
  extents.reserve(selected_.size());
  for (size_t i = 0; i < selected_.size(); ++i) {
    const bool alone = !places.empty() && places.at(i);
    extents.push_back({selected_.file_index(i), selected_.info(i).bytes, 1, false, alone, selected_.runs(i)});
  }
  LayoutOptions layout;
  layout.block_bytes = block_bytes_ = options.block_bytes;
  layout_ = plan_layout(extents, layout);

  slot_bytes_ = options.slot_bytes;
  if (options.cold && looks_cold(options)) {
    slot_bytes_ = options.cold->slot_bytes;
    ring_->replace(options.cold->slots, [device = device_, bytes = slot_bytes_](bool pinned) {
      return device->allocate_slot(bytes, pinned);
    });
  }
  if (!layout_.blocks.empty()) slot_bytes_ = ring_->room(slot_bytes_);
  const ReadPlan reads = plan_reads(layout_, shared_.reads(slot_bytes_));
  slots_ = plan_slots(reads.tasks, layout_.blocks.size(), slot_bytes_);

  blocks_.resize(layout_.blocks.size());
  in_allocation_.resize(layout_.blocks.size());
  in_place_.resize(layout_.blocks.size());
  awaited_.resize(layout_.blocks.size());
  unfinished_ = std::vector<std::atomic<uint32_t>>(layout_.blocks.size());
  for (size_t b = 0; b < layout_.blocks.size(); ++b) unfinished_[b] = slots_.tasks_of_block[b];
  for (size_t i = 0; i < places.size(); ++i) {
    if (!places[i]) continue;
    const uint32_t block = layout_.places[i].block;
    blocks_[block] = std::move(places[i]);
    in_place_[block] = true;
    places_awaited_ = false;
  }
}

// Whether this rank's reads will wait for storage. Files in memory are nobody's cache, and as fast as one.
bool DeviceLoader::looks_cold(const DeviceLoaderOptions& options) const {
  const CheckpointFiles& files = selected_.files();
  if (std::none_of(files.begin(), files.end(), [](const auto& file) { return file->file() != nullptr; })) return false;
  const ReadPlan reads = plan_reads(layout_, shared_.reads(options.cold->slot_bytes));
  if (reads.tasks.empty()) return false;
  return options.read == ReadMode::direct || !looks_cached(selected_, std::vector<HostMemoryRef>(files.size()), reads);
}

void DeviceLoader::open_readers(ReadMode mode) {
  const CheckpointFiles& files = selected_.files();
  readers_.resize(files.size());
  last_task_of_file_.resize(files.size());
  for (size_t t = 0; t < slots_.tasks.size(); ++t) {
    const SlotTask& task = slots_.tasks[t];
    last_task_of_file_[task.file] = t;
    auto& reader = readers_[task.file];
    if (reader) continue;
    const CheckpointFile& file = *files[task.file];
    reader = std::make_unique<RangeReader>(file.source(), file.file(), mode, ReadInto::pinned, counts_.files[task.file],
                                           file.file() ? *pace_ : unpaced_, filler_, mappings_);
  }
}

void DeviceLoader::start(const DeviceLoaderOptions& options) {
  if (slots_.tasks.empty()) return;
  std::vector<uint64_t> ends;
  ends.reserve(slots_.tasks.size());
  uint64_t total = 0;
  for (const SlotTask& task : slots_.tasks) ends.push_back(total += task.bytes.size());
  // Of a block's size by default: the block in hand, and one more. Where ranks share the reading, the block that
  // travels comes between these two.
  const uint64_t window = shared_ ? shared_.own_part(options.block_bytes / 2) : options.window_bytes;
  pool_.reset(new OrderedPool(
      std::move(ends), options.threads, window, [this](size_t task, const Look& look) { work(task, look); },
      options.pause));
  counts_.threads = pool_->thread_count();
}

// Runs on the pool's threads, from before pool_ is assigned.
void DeviceLoader::work(size_t number, const Look& look) {
  const SlotTask& task = slots_.tasks[number];
  const auto copies = [&](auto&& use) {
    for (uint32_t c = task.first_copy; c < task.last_copy; ++c) use(slots_.copies[c]);
  };
  // Whoever starts a block allocates it before reading, if it is not there yet: so the others find it when they have
  // read.
  copies([&](const SlotCopy& copy) {
    if (copy.block_offset == 0) block(copy.block);
  });
  PinnedRing::Lease slot = ring_->acquire();
  {
    const LoadCounts::Read watch(counts_, task.file);
    fill(task, *slot, look);
    counts_.was_read(task.file, task.bytes.size());
  }
  // All of them before the first copy: once one is queued, the slot must not go back as idle.
  copies([&](const SlotCopy& copy) { block(copy.block); });
  {
    Stopwatch watch(copy_ns_);
    const uint64_t image = slot->place_for(slot_bytes_) + task.lead;
    copies([&](const SlotCopy& copy) {
      device_->copy(*slot, image + copy.image_offset, block(copy.block), copy.block_offset, copy.bytes);
    });
    device_->mark_slot(*slot);
    slot.release_to_device();
    mark_blocks(task);
  }
  // Not with a block's first slot, which may be read while nothing else of the block may.
  copies([&](const SlotCopy& copy) {
    const uint64_t half = layout_.blocks[copy.block].bytes / 2;
    if (copy.block_offset <= half && half - copy.block_offset < copy.bytes) allocate_ahead(copy.block + 1);
  });
}

// Reads a task's bytes to where the image has them. Padding becomes zeros, so that blocks of equal files are equal.
void DeviceLoader::fill(const SlotTask& task, const HostSlot& slot, const Look& look) {
  RangeReader& reader = *readers_[task.file];
  char* const image = slot.data() + slot.place_for(slot_bytes_) + task.lead;
  const SlotPiece* const first = slots_.pieces.data() + task.first_piece;
  const SlotPiece* const last = slots_.pieces.data() + task.last_piece;
  if (task.run.piece != 0) {
    read_strided(reader, task.run, image, look);
    selected_.files()[task.file]->source().require_unchanged(task.run.begin);
    return;
  }
  RangeReader::Attempt attempt = reader.begin(task.bytes, look, slot.pinned() || DirectFile::suits_private_memory());
  if (reader.direct(attempt, attempt.range, image)) {
    spread(image, task.bytes.begin, first, last);
  } else {
    for (const SlotPiece* piece = first; piece != last; ++piece)
      reader.buffered(attempt, piece->bytes, image + piece->image_offset);
  }
  reader.end(attempt);
  selected_.files()[task.file]->source().require_unchanged(task.bytes.begin);
  for (const SlotPiece* piece = first; piece + 1 < last; ++piece) {
    const uint64_t end = piece->image_offset + piece->bytes.size();
    std::memset(image + end, 0, piece[1].image_offset - end);
  }
}

DeviceBlock& DeviceLoader::block(uint32_t number) {
  std::unique_lock<std::mutex> lock(allocating_);
  allocated_.wait(lock, [&] { return blocks_[number] || !in_allocation_[number]; });
  if (!blocks_[number]) allocate(number, lock);
  return *blocks_[number];
}

// With allocating_ held, which others may have meanwhile: the driver can take as long as a fifth of the block's
// reading.
void DeviceLoader::allocate(uint32_t number, std::unique_lock<std::mutex>& lock) {
  in_allocation_[number] = true;
  lock.unlock();
  DeviceBlockRef made;
  std::exception_ptr failure;
  try {
    Stopwatch watch(allocate_ns_);
    made = device_->allocate_block(shared_.buffer(layout_.blocks[number].bytes));
  } catch (const Error& error) {
    failure = std::make_exception_ptr(selected_.for_tensor(error, layout_.blocks[number].first_tensor));
  } catch (...) {
    failure = std::current_exception();
  }
  lock.lock();
  in_allocation_[number] = false;
  blocks_[number] = std::move(made);
  allocated_.notify_all();  // also of a failure: whoever else needs the block tries as well
  if (failure) std::rethrow_exception(failure);
}

// The block that reading comes to next, so that nobody waits for the driver then. Large ones are left: what a consumer
// may not have room for beside them is more than a block as there are many.
void DeviceLoader::allocate_ahead(uint32_t number) {
  if (number >= layout_.blocks.size() || layout_.blocks[number].bytes > block_bytes_) return;
  std::unique_lock<std::mutex> lock(allocating_);
  if (blocks_[number] || in_allocation_[number]) return;
  try {
    allocate(number, lock);
  } catch (const std::exception&) {
    // There may be room when it is needed. If not, that is when it is told.
  }
}

// After a task's copies were queued. The last task of a block, whichever that is, finds all others' copies queued.
void DeviceLoader::mark_blocks(const SlotTask& task) {
  for (uint32_t c = task.first_copy; c < task.last_copy; ++c) {
    const uint32_t number = slots_.copies[c].block;
    if (unfinished_[number].fetch_sub(1, std::memory_order_acq_rel) == 1) device_->mark_block(block(number));
  }
}

// A reader may have a second descriptor.
void DeviceLoader::let_go_of_passed_files(uint32_t current_file) {
  while (first_held_file_ < current_file) {
    const size_t f = first_held_file_;
    if (pool_ && !pool_->is_done(last_task_of_file_[f])) return;
    readers_[f] = {};
    ++first_held_file_;
  }
}

DeviceLoader::Step DeviceLoader::next(DeviceTensor& tensor, std::chrono::milliseconds patience) {
  if (interrupted_) return Step::end;
  if (forked())
    throw Error(ErrorKind::usage, "this load was begun before fork(); its threads are in the parent process only");
  if (next_ == selected_.size()) {
    await_places();
    return Step::end;
  }
  const TensorPlace& place = layout_.places[next_];
  const uint32_t number = place.block;
  const bool empty = selected_.info(next_).bytes.empty();
  if (!empty) {
    const bool complete = shared_ ? shared_.complete(number, patience, counts_.shared_ns) : await(number, patience);
    if (!complete) return interrupted_ ? Step::end : Step::not_ready;
    if (!in_place_[number]) device_->await_block(*blocks_[number]);
    awaited_[number] = true;
  }
  if (selected_.file_index(next_) > first_held_file_) let_go_of_passed_files(selected_.file_index(next_));
  tensor.file = selected_.file(next_);
  tensor.info = &selected_.info(next_);
  tensor.in_place = in_place_[number];
  tensor.block = tensor.in_place ? nullptr : empty ? empty_block() : blocks_[number];
  tensor.block_offset = empty ? 0 : place.block_offset;
  ++next_;
  counts_.deliver(tensor.info->bytes.size());
  if (next_ == selected_.size()) counts_.end();
  // The last tensor of a block takes the loader's own reference with it.
  if (next_ == layout_.blocks[number].last_tensor && !in_place_[number]) blocks_[number] = nullptr;
  return Step::tensor;
}

// Until this rank's copies into the block are queued.
bool DeviceLoader::await(uint32_t block, std::chrono::milliseconds patience) {
  if (slots_.tasks_of_block[block] == 0) return true;
  const uint32_t last_task = slots_.last_task_of_block[block];
  pool_->advance(last_task);
  if (pool_->is_done(last_task)) return true;
  Stopwatch watch(counts_.wait_ns);
  try {
    return pool_->wait(last_task, patience);
  } catch (const Error& error) {
    if (interrupted_) return false;  // the threads were stopped: nothing has failed
    throw selected_.name_tensor(error, layout_.blocks[block].first_tensor);
  }
}

// GroupExchange::Prepare.
bool DeviceLoader::prepare(uint32_t number, std::chrono::milliseconds patience, Payload& payload) {
  if (!await(number, patience)) return false;
  DeviceBlock& memory = block(number);
  // What is only received must still be written after its memory's last user.
  if (slots_.tasks_of_block[number] == 0) device_->mark_block(memory);
  payload.device = blocks_[number];
  payload.bytes = shared_.buffer(layout_.blocks[number].bytes);
  return true;
}

DeviceBlockRef DeviceLoader::empty_block() {
  if (!empty_) empty_ = device_->allocate_block(0);
  return empty_;
}

// The caller's memory is written on the side stream: the stream that is current now must not run ahead of that.
void DeviceLoader::await_places() {
  if (places_awaited_) return;
  places_awaited_ = true;
  device_->await_all();
}

void DeviceLoader::interrupt() noexcept {
  interrupted_ = true;
  if (forked()) return;
  if (pool_) pool_->stop();
  pace_->stop();
  ring_->stop();
}

void DeviceLoader::close() noexcept {
  interrupt();
  counts_.end();
  if (forked()) return;
  if (pool_) pool_->join();
  shared_.leave();
  for (size_t b = 0; b < blocks_.size(); ++b) {
    if (blocks_[b] && !in_place_[b] && !awaited_[b]) device_->abandon(*blocks_[b]);
  }
  try {
    await_places();
  } catch (const std::exception&) {
    // The device has failed; whoever uses the places next will hear of it.
  }
  blocks_.clear();
  empty_ = nullptr;
  ring_->close();
  readers_.clear();
  selected_.close();
}

bool DeviceLoader::found_pageable() {
  if (pageable_found_ || !ring_->pageable()) return false;
  return pageable_found_ = true;
}

DeviceLoadStats DeviceLoader::stats() const {
  DeviceLoadStats stats;
  stats.copy_ns = copy_ns_;
  stats.allocate_ns = allocate_ns_;
  stats.slots_filled = slots_.tasks.size();
  stats.copies = slots_.copies.size();
  for (size_t b = 0; b < layout_.blocks.size(); ++b) {
    if (in_place_[b]) continue;
    ++stats.blocks;
    stats.block_bytes += shared_.buffer(layout_.blocks[b].bytes);
  }
  if (!forked()) stats.ring = ring_->stats();  // the child may find its mutex held for ever
  return stats;
}

}  // namespace weightload
