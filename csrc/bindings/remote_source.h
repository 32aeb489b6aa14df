#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/gil.h"
#include "file/byte_source.h"

namespace weightload {

// What a server has, by way of an object of Python's (weightload/_remote/source.py), which has
//   ask(offset, count) -> answer    begins a request, and returns at once
//   begin_direct(offset, count)     makes one, too, or none (None): see weightload/_remote/direct.py
// and its answer, of which each may be called by any thread,
//   wait(seconds) -> bool           whether it has come
//   bytes() -> a buffer             of exactly so many bytes, of the object as it was when it was opened; or raises
//   cancel()                        nobody wants it any more
// Threads of the core take the GIL to ask and to wait, which lets go of it; bytes are copied without it. A direct
// request has
//   connection, text, patience      a Connection (file/connection.h), what to send, and seconds
//   is_wanted(head) -> bool         whether the body behind this head is exactly what was wanted
//   done(body)                      it has been taken to its end
//   failed()                        it has not: the range is asked for. Only what done() raises is an error.
// A load that is left drops it without a call: Python code that runs then could swallow what a signal's handler raises.
class RemoteSource final : public ByteSource {
 public:
  RemoteSource(pybind11::object object, std::string path, uint64_t size);

  // Error{read} with the words of what the answer raised.
  void read(uint64_t offset, void* destination, size_t count) const override;
  void read_looking(uint64_t offset, void* destination, size_t count, const Look& look) const override;

  bool is_remote() const override { return true; }
  void read_on(bool) const override {}
  void require_unchanged(uint64_t) const override {}  // every answer is checked when it comes
  const std::string& path() const override { return path_; }
  uint64_t size() const override { return size_; }
  pybind11::object object() const { return object_.get(); }

 private:
  // Whether it has been read so; whatever is in the memory if not. With the GIL held.
  bool read_directly(uint64_t offset, void* destination, size_t count, const Look& look) const;

  const ObjectOfAnyThread object_;
  const std::string path_;
  const uint64_t size_;
};

}  // namespace weightload
