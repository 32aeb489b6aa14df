#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/look.h"
#include "file/byte_source.h"
#include "file/byte_tap.h"
#include "file/file.h"
#include "format/header.h"

namespace weightload {

// An open safetensors file (or bytes in memory, or on a server) with its validated header. Immutable, shared between
// loads.
class CheckpointFile {
 public:
  // Opens the file and reads its header. The header is read, not mapped: a file that is truncated meanwhile
  // then gives an error where touching a mapping would end the process. Even 100,000 tensors' 11 MB copy in 2
  // ms.
  //
  // Reads in pieces, and looks between them; `look` also as in open_files::open.
  static std::shared_ptr<const CheckpointFile> open(const std::string& path, const Look& look = no_look);

  // Opens many, on up to `threads` threads, in the given order. Throws the error of the first file that fails. Calls
  // `pause` now and then in the calling thread; should that throw, no further file is opened.
  static std::vector<std::shared_ptr<const CheckpointFile>> open_all(const std::vector<std::string>& paths,
                                                                     unsigned threads, const Look& pause = no_look);

  // Takes what is no file. Reads its header; `look` as above.
  static std::shared_ptr<const CheckpointFile> from_source(std::shared_ptr<const ByteSource> source,
                                                           const Look& look = no_look);

  // Takes bytes that the caller keeps alive and unchanged.
  static std::shared_ptr<const CheckpointFile> from_memory(const void* data, uint64_t size);

  // The same file with some of its tensors, or parts of them, in the order of the file.
  std::shared_ptr<const CheckpointFile> with_tensors(std::vector<TensorInfo> tensors) const;

  // The same file, of which a load tells this what it reads. Not what a server has: the object behind it has its own.
  std::shared_ptr<const CheckpointFile> with_tap(std::shared_ptr<const ByteTap> tap) const;

  // The same file, which others read beside the load, through the page cache: so should the load, and each finds there
  // what the other has read.
  std::shared_ptr<const CheckpointFile> also_read_by_others() const;

  const Header& header() const { return header_; }
  const ByteSource& source() const { return *source_; }
  const std::string& path() const { return source_->path(); }
  uint64_t size() const { return source_->size(); }
  const File* file() const { return file_.get(); }   // null for memory, and for what a server has
  const ByteTap* tap() const { return tap_.get(); }  // mostly null
  bool is_also_read_by_others() const { return also_read_by_others_; }

  // Of memory and files in pieces; of a server in one request.
  void read(ByteRange range, char* destination, Pace& pace, const Look& look) const;

  bool is_remote() const { return source_->is_remote(); }

  // Whether views of the file can be had: not of bytes in memory, nor where reading goes past the page cache.
  bool can_map() const { return can_map_; }

  // What opening took, in nanoseconds: all of it, and of this the header's parsing. 0 where nothing was opened.
  uint64_t open_ns() const { return open_ns_; }
  uint64_t parse_ns() const { return parse_ns_; }

 private:
  CheckpointFile(std::shared_ptr<const ByteSource> source, const Look& look);
  CheckpointFile(const CheckpointFile& other, Header header);

  std::shared_ptr<const ByteSource> source_;
  std::shared_ptr<const File> file_;
  Header header_;
  bool can_map_ = false;
  bool also_read_by_others_ = false;
  std::shared_ptr<const ByteTap> tap_;
  std::atomic<uint64_t> open_ns_{0}, parse_ns_{0};
};

using CheckpointFiles = std::vector<std::shared_ptr<const CheckpointFile>>;

}  // namespace weightload
