#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/byte_range.h"
#include "base/look.h"
#include "threads/pace.h"

namespace weightload {

// Something with a fixed number of bytes that many threads may read at once: a file, memory, or what a server has.
class ByteSource {
 public:
  virtual ~ByteSource() = default;

  // Fills [destination, destination + count) from `offset`, or throws; never returns with fewer bytes.
  virtual void read(uint64_t offset, void* destination, size_t count) const = 0;

  // The same, with a look now and then while it waits, where a wait can be broken off.
  virtual void read_looking(uint64_t offset, void* destination, size_t count, const Look&) const {
    read(offset, destination, count);
  }

  // Whether each read is a request to a server.
  virtual bool is_remote() const { return false; }

  // Whether the system should read on beyond what it is asked for, from now on. Advice, of which each change is a call.
  virtual void read_on(bool wanted) const = 0;

  // Throws when the bytes are no longer those that were there when it was opened. After reading and before the bytes go
  // to anyone: what was read until then is then one state, that of the opening. `offset` serves the message.
  virtual void require_unchanged(uint64_t offset) const = 0;

  // The bytes that it starts with, before others read it: something to compare later, where nothing else tells a
  // change.
  virtual void remember_start(std::string_view) const {}

  virtual const std::string& path() const = 0;  // for messages
  virtual uint64_t size() const = 0;            // bytes, as it was when opened
};

// Reads a range in pieces, with a look before each; see Note [Pieces] in threads/pace.h.
inline void read_in_pieces(const ByteSource& source, ByteRange range, char* destination, Pace& pace, const Look& look) {
  pace.in_pieces(range, look, [&](ByteRange piece) {
    source.read_on(pace.allows(Pace::kReadOn));
    source.read_looking(piece.begin, destination + (piece.begin - range.begin), static_cast<size_t>(piece.size()),
                        look);
  });
}

}  // namespace weightload
