#include "checkpoint/checkpoint_file.h"

#include <algorithm>
#include <limits>

#include "base/error.h"
#include "base/stopwatch.h"
#include "file/file_system.h"
#include "file/memory_source.h"
#include "memory/host_memory.h"
#include "page_cache/residency.h"
#include "threads/ordered_pool.h"

namespace weightload {
namespace {

// One read gets the length and, of most files, the whole header.
constexpr uint64_t kFirstRead = 64 << 10;

Header read_header(const ByteSource& source, std::atomic<uint64_t>& parse_ns, const Look& look) {
  std::string start(std::min(kFirstRead, source.size()), '\0');
  source.read_looking(0, start.data(), start.size(), look);
  source.require_unchanged(0);
  const uint64_t length = check_header_length(start, source.size(), source.path());
  const auto parse = [&](std::string_view json) {
    Stopwatch watch(parse_ns);
    return parse_header(json, source.size(), source.path());
  };
  if (kLengthBytes + length <= start.size()) {
    source.remember_start(std::string_view(start).substr(0, kLengthBytes + length));
    return parse(std::string_view(start).substr(kLengthBytes, length));
  }
  // A block, not a string: huge pages, and not filled with zeros first. Saves a fifth of the time at 13 MB.
  const HostMemoryRef text = allocate_block(kLengthBytes + length);
  Pace pace;
  read_in_pieces(source, {0, kLengthBytes + length}, text->data(), pace, look);
  source.require_unchanged(kLengthBytes);
  source.remember_start({text->data(), kLengthBytes + length});
  return parse({text->data() + kLengthBytes, length});
}

}  // namespace

CheckpointFile::CheckpointFile(std::shared_ptr<const ByteSource> source, const Look& look)
    : source_(std::move(source)) {
  header_ = read_header(*source_, parse_ns_, look);
}

CheckpointFile::CheckpointFile(const CheckpointFile& other, Header header)
    : source_(other.source_),
      file_(other.file_),
      header_(std::move(header)),
      can_map_(other.can_map_),
      also_read_by_others_(other.also_read_by_others_),
      tap_(other.tap_),
      open_ns_(other.open_ns_.load()),
      parse_ns_(other.parse_ns_.load()) {}

std::shared_ptr<const CheckpointFile> CheckpointFile::with_tensors(std::vector<TensorInfo> tensors) const {
  Header header;
  header.tensors = std::move(tensors);
  header.data_begin = header_.data_begin;
  return std::shared_ptr<const CheckpointFile>(new CheckpointFile(*this, std::move(header)));
}

std::shared_ptr<const CheckpointFile> CheckpointFile::with_tap(std::shared_ptr<const ByteTap> tap) const {
  std::shared_ptr<CheckpointFile> tapped(new CheckpointFile(*this, header_));
  tapped->tap_ = std::move(tap);
  return tapped;
}

std::shared_ptr<const CheckpointFile> CheckpointFile::also_read_by_others() const {
  std::shared_ptr<CheckpointFile> same(new CheckpointFile(*this, header_));
  same->also_read_by_others_ = true;
  return same;
}

std::shared_ptr<const CheckpointFile> CheckpointFile::open(const std::string& path, const Look& look) {
  std::atomic<uint64_t> open_ns{0};
  std::shared_ptr<CheckpointFile> opened;
  {
    Stopwatch watch(open_ns);
    auto file = File::open(path, look);
    opened.reset(new CheckpointFile(file, look));
    opened->can_map_ = !bypasses_page_cache(*file);
    opened->file_ = std::move(file);
  }
  opened->open_ns_ = open_ns.load();
  return opened;
}

CheckpointFiles CheckpointFile::open_all(const std::vector<std::string>& paths, unsigned threads, const Look& pause) {
  CheckpointFiles files(paths.size());
  if (paths.size() == 1 || threads <= 1) {
    for (size_t i = 0; i < paths.size(); ++i) {
      if (i > 0) pause();
      files[i] = open(paths[i], pause);
    }
    return files;
  }
  // One task a file, all allowed to start: order matters for which error is thrown, not for the work.
  std::vector<uint64_t> ends(paths.size());
  for (size_t i = 0; i < ends.size(); ++i) ends[i] = i + 1;
  OrderedPool pool(
      ends, threads, std::numeric_limits<uint64_t>::max(),
      [&](size_t i, const Look& look) { files[i] = open(paths[i], look); }, pause);
  while (!paths.empty() && !pool.wait(paths.size() - 1, std::chrono::milliseconds(100))) pause();
  return files;
}

std::shared_ptr<const CheckpointFile> CheckpointFile::from_source(std::shared_ptr<const ByteSource> source,
                                                                  const Look& look) {
  std::atomic<uint64_t> open_ns{0};
  std::shared_ptr<CheckpointFile> opened;
  {
    Stopwatch watch(open_ns);
    opened.reset(new CheckpointFile(std::move(source), look));
  }
  opened->open_ns_ = open_ns.load();
  return opened;
}

void CheckpointFile::read(ByteRange range, char* destination, Pace& pace, const Look& look) const {
  if (!is_remote()) return read_in_pieces(*source_, range, destination, pace, look);
  source_->read_looking(range.begin, destination, static_cast<size_t>(range.size()), look);
}

std::shared_ptr<const CheckpointFile> CheckpointFile::from_memory(const void* data, uint64_t size) {
  return from_source(std::make_shared<MemorySource>(data, size));
}

}  // namespace weightload
