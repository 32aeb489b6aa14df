#include "load/device_loader.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <utility>

#include "base/error.h"
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
    : Loader(std::move(files), selection, parts, std::move(exchange), options.threads),
      device_(std::move(device)),
      ring_(std::move(ring)) {
  leave_taps();
  plan(std::move(places), options);
  shared_.begin(layout_, [this](auto&&... block) { return prepare(block...); }, selected_.files());
  start_reading(options);
  counts_.made();
}

DeviceLoader::~DeviceLoader() { close(); }

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

  blocks_.reset(new Blocks(layout_.blocks.size()));
  for (size_t b = 0; b < layout_.blocks.size(); ++b) blocks_->states[b].unfinished = slots_.tasks_of_block[b];
  for (size_t i = 0; i < places.size(); ++i) {
    if (!places[i]) continue;
    BlockState& block = blocks_->states[layout_.places[i].block];
    block.memory = std::move(places[i]);
    block.in_place = true;
    places_awaited_ = false;
  }
}

// Whether this rank's reads will wait for storage. Files in memory are nobody's cache, and as fast as one.
bool DeviceLoader::looks_cold(const DeviceLoaderOptions& options) const {
  const CheckpointFiles& files = selected_.files();
  if (std::none_of(files.begin(), files.end(), [](const auto& file) { return file->file() != nullptr; })) return false;
  const ReadPlan reads = plan_reads(layout_, shared_.reads(options.cold->slot_bytes));
  if (reads.tasks.empty()) return false;
  return options.read == ReadMode::direct || !looks_cached(selected_, maps(), reads);
}

void DeviceLoader::start_reading(const DeviceLoaderOptions& options) {
  if (slots_.tasks.empty()) return;
  for (const SlotTask& task : slots_.tasks) open_reader(task.file, options.read, ReadInto::pinned);
  // Of a block's size by default: the block in hand, and one more. Where ranks share the reading, the block that
  // travels comes between these two.
  const uint64_t window = shared_ ? shared_.own_part(options.block_bytes / 2) : options.window_bytes;
  start(
      slots_.tasks, threads_of(options.threads, options.threads_at_first), window,
      [this](size_t task, const Look& look) { work(task, look); }, options.pause);
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
    fill_slot(task, *slot, look);
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
void DeviceLoader::fill_slot(const SlotTask& task, const HostSlot& slot, const Look& look) {
  RangeReader& reader = *held_[task.file].reader;
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
  BlockState& state = blocks_->states[number];
  std::unique_lock<std::mutex> lock(blocks_->allocating);
  blocks_->allocated.wait(lock, [&] { return state.memory || !state.in_allocation; });
  if (!state.memory) allocate(number, lock);
  return *state.memory;
}

// With `allocating` held, which others may have meanwhile: the driver can take as long as a fifth of the block's
// reading.
void DeviceLoader::allocate(uint32_t number, std::unique_lock<std::mutex>& lock) {
  BlockState& state = blocks_->states[number];
  state.in_allocation = true;
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
  state.in_allocation = false;
  state.memory = std::move(made);
  blocks_->allocated.notify_all();  // also of a failure: whoever else needs the block tries as well
  if (failure) std::rethrow_exception(failure);
}

// Allocates the block that reading comes to next, so that nobody waits for the driver then. Not one that is larger than
// usual: the consumer may have no room for two of those.
void DeviceLoader::allocate_ahead(uint32_t number) {
  if (number >= layout_.blocks.size() || layout_.blocks[number].bytes > block_bytes_) return;
  const BlockState& state = blocks_->states[number];
  std::unique_lock<std::mutex> lock(blocks_->allocating);
  if (state.memory || state.in_allocation) return;
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
    std::atomic<uint32_t>& unfinished = blocks_->states[number].unfinished;
    if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) device_->mark_block(block(number));
  }
}

DeviceLoader::Step DeviceLoader::next(DeviceTensor& tensor, std::chrono::milliseconds patience) {
  if (interrupted_) return Step::end;
  require_process();
  if (next_ == selected_.size()) {
    await_places();
    return Step::end;
  }
  const TensorPlace& place = layout_.places[next_];
  const uint32_t number = place.block;
  BlockState& state = blocks_->states[number];
  const bool empty = selected_.info(next_).bytes.empty();
  if (!empty) {
    const bool complete = shared_ ? shared_.complete(number, patience, counts_.shared_ns) : await(number, patience);
    if (!complete) return no_tensor();
    if (!state.in_place) device_->await_block(*state.memory);
    state.awaited = true;
  }
  tensor.in_place = state.in_place;
  tensor.block = state.in_place ? nullptr : empty ? empty_block() : state.memory;
  tensor.block_offset = empty ? 0 : place.block_offset;
  hand_out(tensor);
  // The last tensor of a block takes the loader's own reference with it.
  if (next_ == layout_.blocks[number].last_tensor && !state.in_place) state.memory = nullptr;
  return Step::tensor;
}

// Until this rank's copies into the block are queued.
bool DeviceLoader::await(uint32_t block, std::chrono::milliseconds patience) {
  return slots_.tasks_of_block[block] == 0 ||
         await_task(slots_.last_task_of_block[block], layout_.blocks[block].first_tensor, patience);
}

// GroupExchange::Prepare.
bool DeviceLoader::prepare(uint32_t number, std::chrono::milliseconds patience, Payload& payload) {
  if (!await(number, patience)) return false;
  DeviceBlock& memory = block(number);
  // What is only received must still be written after its memory's last user.
  if (slots_.tasks_of_block[number] == 0) device_->mark_block(memory);
  payload.device = blocks_->states[number].memory;
  payload.bytes = shared_.buffer(layout_.blocks[number].bytes);
  return true;
}

DeviceBlockRef DeviceLoader::empty_block() {
  if (!blocks_->empty) blocks_->empty = device_->allocate_block(0);
  return blocks_->empty;
}

// The caller's memory is written on the side stream: the stream that is current now must not run ahead of that.
void DeviceLoader::await_places() {
  if (places_awaited_) return;
  places_awaited_ = true;
  device_->await_all();
}

void DeviceLoader::interrupt() noexcept {
  stop();
  if (!forked()) ring_->stop();
}

void DeviceLoader::close() noexcept {
  interrupt();
  end();
  if (forked()) return;  // the device's driver did not come along: nothing can be waited for or freed
  for (BlockState& block : blocks_->states) {
    if (block.memory && !block.in_place && !block.awaited) device_->abandon(*block.memory);
  }
  try {
    await_places();
  } catch (const std::exception&) {
    // The device has failed; whoever uses the places next will hear of it.
  }
  for (BlockState& block : blocks_->states) block.memory = nullptr;
  blocks_->empty = nullptr;
  ring_->close();
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
    if (blocks_->states[b].in_place) continue;
    ++stats.blocks;
    stats.block_bytes += shared_.buffer(layout_.blocks[b].bytes);
  }
  if (!forked()) stats.ring = ring_->stats();  // the child may find its mutex held for ever
  return stats;
}

}  // namespace weightload
