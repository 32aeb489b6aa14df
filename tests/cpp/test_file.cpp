// Files as hostile input: what is opened at all, and a file that changes after it was.
#include "file/file.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <functional>

#include "base/error.h"
#include "check.h"
#include "checkpoint.h"
#include "file/fault_hook.h"
#include "page_cache/residency.h"

using namespace weightload;

namespace {

bool is_refused_kind(const Error& error) { return error.kind == ErrorKind::header && error.rule == "NotARegularFile"; }

bool is_changed(const Error& error) {
  return error.kind == ErrorKind::read && error.context.error_number == 0 && error.context.offset == 7 &&
         error.message.find("changed while it was read") != std::string::npos;
}

// Last modified long ago, so that any write shows whatever the file system's clock.
void make_old(const std::string& path) {
  const struct timespec times[2] = {{1'600'000'000, 0}, {1'600'000'000, 0}};
  CHECK(::utimensat(AT_FDCWD, path.c_str(), times, 0) == 0);
}

void write_at(const std::string& path, off_t offset, int flags) {
  const int fd = ::open(path.c_str(), O_WRONLY | flags);
  CHECK(fd >= 0);
  CHECK(::pwrite(fd, "x", 1, offset) == 1);
  ::close(fd);
}

std::string free_name() {
  const TemporaryFile temporary(0, {1});
  return temporary.path;
}

using Change = std::function<void(const std::string& path)>;

}  // namespace

TEST(only_regular_files_are_opened) {
  const std::string path = free_name();
  CHECK(::mkfifo(path.c_str(), 0600) == 0);
  CHECK_THROWS(File::open(path), Error, is_refused_kind(error));
  ::unlink(path.c_str());

  const int listener = ::socket(AF_UNIX, SOCK_STREAM, 0);
  struct sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  CHECK(::bind(listener, reinterpret_cast<struct sockaddr*>(&address), sizeof(address)) == 0);
  CHECK_THROWS(File::open(path), Error, is_refused_kind(error));
  ::unlink(path.c_str());
  ::close(listener);

  CHECK(::symlink(path.c_str(), path.c_str()) == 0);
  CHECK_THROWS(File::open(path), Error, error.kind == ErrorKind::open && error.context.error_number == ELOOP);
  ::unlink(path.c_str());

  for (const char* other : {"/tmp", "/dev/null", "/dev/zero"})
    CHECK_THROWS(File::open(other), Error, is_refused_kind(error));
  CHECK_THROWS(File::open(path), Error, error.context.error_number == ENOENT && error.context.path == path);
}

TEST(changes_of_the_bytes_are_noticed) {
  const std::vector<Change> changes = {
      [](const std::string& path) { write_at(path, 5, 0); },
      [](const std::string& path) { write_at(path, 0, O_APPEND); },
      [](const std::string& path) { write_at(path, 0, O_TRUNC); },
      [](const std::string& path) { CHECK(::truncate(path.c_str(), 10) == 0); },
      [](const std::string& path) { CHECK(::truncate(path.c_str(), 1 << 20) == 0); },
  };
  for (const Change& change : changes) {
    const TemporaryFile temporary(0, {1000});
    make_old(temporary.path);
    const auto file = File::open(temporary.path);
    file->require_unchanged(7);
    change(temporary.path);
    CHECK_THROWS(file->require_unchanged(7), Error, is_changed(error));
  }
}

TEST(what_leaves_the_bytes_is_no_change) {
  const std::vector<Change> changes = {
      [](const std::string& path) { CHECK(::chmod(path.c_str(), 0400) == 0); },
      [](const std::string& path) {
        const std::string link = path + "-link";
        CHECK(::link(path.c_str(), link.c_str()) == 0);
        ::unlink(link.c_str());
      },
      [](const std::string& path) {
        TemporaryFile other(1, {5});
        CHECK(::rename(other.path.c_str(), path.c_str()) == 0);
      },
      [](const std::string& path) { CHECK(::unlink(path.c_str()) == 0); },
  };
  for (const Change& change : changes) {
    const TemporaryFile temporary(0, {1000});
    make_old(temporary.path);
    const auto file = File::open(temporary.path);
    change(temporary.path);
    unsigned char byte = 0;
    file->read(file->size() - 1, &byte, 1);
    CHECK(byte == byte_at(0, file->size() - 1));
    file->require_unchanged(7);
  }
}

TEST(a_file_that_changes_under_its_header_is_refused) {
  const TemporaryFile temporary(0, {1000});
  make_old(temporary.path);
  // Hit by the header's read: the file has ended by then.
  fault_hook::arm({fault_hook::Fault::end_of_file, 0, 1, 0, {}});
  CHECK_THROWS(CheckpointFile::open(temporary.path), Error, error.kind == ErrorKind::read);
  fault_hook::disarm();
  CHECK(CheckpointFile::open(temporary.path)->header().tensors.size() == 1);
}

TEST(residency_of_a_sparse_giant_is_asked_piece_by_piece) {
  const TemporaryFile temporary(0, {1000});
  constexpr off_t kGiant = off_t{5} << 30;
  CHECK(::truncate(temporary.path.c_str(), kGiant) == 0);
  write_at(temporary.path, kGiant - 1, 0);
  write_at(temporary.path, kGiant / 2, 0);
  const auto file = File::open(temporary.path);
  const auto cached = cached_bytes_by_mincore(*file, {100, file->size()});
  CHECK(cached && *cached >= 3 * 4096 && *cached <= 1 << 20);  // pages at the beginning, in the middle, at the end
}

TEST(text_of_files_is_printable_in_messages) {
  CHECK(printable("plain \xc3\xbc") == "plain \xc3\xbc");
  CHECK(printable(std::string("\x1b[2J\n\0\x7f", 7)) == "\\x1b[2J\\x0a\\x00\\x7f");
  CHECK(printable("a\xc2\x9b"
                  "2Jb") == "a\\xc2\\x9b2Jb");
  CHECK(printable("\xe2\x80\xae\xe2\x80\xa8\xe2\x81\xa6\xd8\x9c\xe2\x80\x8f") ==
        "\\xe2\\x80\\xae\\xe2\\x80\\xa8\\xe2\\x81\\xa6\\xd8\\x9c\\xe2\\x80\\x8f");
  CHECK(printable("\xc2\xa0\xe2\x80\x94\xe2\x81\xaa\xd8\x9b\xc2") == "\xc2\xa0\xe2\x80\x94\xe2\x81\xaa\xd8\x9b\xc2");
  const Error error(ErrorKind::header, "what", {"a\nb", std::string("t\0", 2), {}, 0});
  CHECK(std::string(error.what()) == "a\\x0ab: tensor `t\\x00`: what");
}
