#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "base/look.h"
#include "checkpoint/checkpoint_file.h"
#include "memory/host_memory.h"

namespace weightload {

// A tensor or part of one in host memory, which `memory` keeps alive.
struct TensorInMemory {
  TensorInfo info;       // of the part
  char* data = nullptr;  // null for an empty tensor
  HostMemoryRef memory;
};

// Rows of a tensor, by its first dimension as torch counts it (see rows_of).
struct RowRange {
  uint64_t begin = 0;
  uint64_t end = 0;
};

// Hands out single tensors of a file, in the calling thread: views of the mapped file, or private memory. Safe to use
// from several threads, and in a forked child, whatever the parent's threads were doing.
//
// A view may be handed out of bytes that are at hand, or have been brought in: one that cannot be read is then an
// error, and not a SIGBUS where it is touched.
class TensorReader {
 public:
  explicit TensorReader(std::shared_ptr<const CheckpointFile> file);
  ~TensorReader();

  TensorReader(const TensorReader&) = delete;
  TensorReader& operator=(const TensorReader&) = delete;

  const CheckpointFile& file() const { return *file_; }
  std::shared_ptr<CheckpointFile> shared_file() const { return std::const_pointer_cast<CheckpointFile>(file_); }

  // A tensor's number in the header. The index is made on first use: opening a file to look at its header costs none.
  std::optional<uint32_t> find(std::string_view name) const;

  // Whether a view can be had: some files have no mapping, and tensors that lie misaligned must be read.
  bool can_map(uint32_t tensor) const;

  // Whether bytes of the file may be looked at in the mapping: they are known to be in the page cache, or, where the
  // kernel does not say, seem to be there and could be mapped. Cheap for many small ranges one after the other. Nothing
  // where that would have to wait, for storage, a server or another thread, and `may_wait` is false.
  std::optional<bool> is_at_hand(ByteRange bytes, bool may_wait);

  // Whether first_view() and view_again() may wait for a server.
  bool may_wait() const { return file_->file() && file_->file()->may_wait(); }

  // Reads into the page cache what is not at hand of a tensor, or of some rows of it. Calls `pause` now and then, which
  // may throw.
  void bring_in(uint32_t tensor, const std::vector<RowRange>* rows, const Look& pause);

  // The tensor, or rows of it, in the mapping, if nobody has been given any of these bytes there: a mapping is
  // copy-on-write, and what one holder of a view writes must not be what the next is given.
  std::optional<TensorInMemory> first_view(uint32_t tensor, const RowRange* rows);

  // The same as first_view where it has been given, in a new mapping of the file. Mappings are limited
  // (vm.max_map_count).
  TensorInMemory view_again(uint32_t tensor);

  // Reads whole rows, one range behind the other, into private memory; without ranges all of the tensor. Calls `pause`
  // now and then, which may throw.
  TensorInMemory read(uint32_t tensor, const std::vector<RowRange>* rows, const Look& pause) const;

  // The bytes and header entry of some rows. Throws Error{tensor} where the tensor has no such rows.
  TensorInfo narrowed(uint32_t tensor, RowRange rows) const;

 private:
  struct State;

  State& state() const;
  uint64_t row_count(uint32_t tensor) const;
  void require_unchanged(const TensorInfo& info) const;
  HostMemoryRef map();
  void map_anew(State& now);

  const std::shared_ptr<const CheckpointFile> file_;
  mutable std::atomic<State*> state_;
};

}  // namespace weightload
