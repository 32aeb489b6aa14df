// More files than descriptors: which are closed, and what they are when they are opened again.
#include "file/open_files.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "checkpoint.h"
#include "file/file.h"
#include "read/direct_file.h"

using namespace weightload;

namespace {

size_t open_descriptors() {
  size_t count = 0;
  DIR* const folder = ::opendir("/proc/self/fd");
  while (::readdir(folder)) ++count;
  ::closedir(folder);
  return count - 3;  // itself, . and ..
}

// The undefined-behaviour sanitizer asks with a pipe whether memory can be read: without descriptors it finds that none
// can.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kNeedsDescriptors = true;
#else
constexpr bool kNeedsDescriptors = false;
#endif

// A soft limit for as long as it lives.
struct Limit {
  explicit Limit(rlim_t files) {
    CHECK(::getrlimit(RLIMIT_NOFILE, &before) == 0);
    set(files);
  }
  ~Limit() { CHECK(::setrlimit(RLIMIT_NOFILE, &before) == 0); }
  void set(rlim_t files) const {
    const struct rlimit now{files, before.rlim_max};
    CHECK(::setrlimit(RLIMIT_NOFILE, &now) == 0);
  }
  struct rlimit before{};
};

std::vector<std::unique_ptr<TemporaryFile>> make_files(size_t count) {
  std::vector<std::unique_ptr<TemporaryFile>> files;
  for (size_t f = 0; f < count; ++f) files.push_back(std::make_unique<TemporaryFile>(f, std::vector<uint64_t>{1000}));
  return files;
}

using Opened = std::vector<std::shared_ptr<const File>>;

Opened open_all(const std::vector<std::unique_ptr<TemporaryFile>>& files) {
  Opened opened;
  for (const auto& file : files) opened.push_back(File::open(file->path));
  return opened;
}

void check_bytes(const File& file, size_t number) {
  unsigned char byte = 0;
  file.read(file.size() - 1, &byte, 1);
  CHECK(byte == byte_at(number, file.size() - 1));
  file.require_unchanged(0);
}

}  // namespace

TEST(at_most_half_of_the_limit_is_kept) {
  const auto files = make_files(100);
  const Limit limit(64);
  const size_t before = open_descriptors();
  const Opened opened = open_all(files);
  for (int round = 0; round < 3; ++round) {
    for (size_t f = 0; f < opened.size(); ++f) {
      if (round > 0 && f == 0) CHECK(opened[f]->may_wait());  // closed meanwhile
      check_bytes(*opened[f], f);
      CHECK(!opened[f]->may_wait());
      CHECK(open_descriptors() <= before + 32);
    }
  }
}

TEST(below_half_of_the_limit_nothing_is_closed) {
  const auto files = make_files(20);
  const Limit limit(64);
  const size_t before = open_descriptors();
  const Opened opened = open_all(files);
  CHECK(open_descriptors() == before + 20);
  for (const auto& file : files) ::unlink(file->path.c_str());
  for (size_t f = 0; f < opened.size(); ++f) check_bytes(*opened[f], f);
}

TEST(others_descriptors_are_not_needed) {
  const auto files = make_files(40);
  const Limit limit(64);
  std::vector<UniqueFd> others;
  while (others.size() < 50) others.emplace_back(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  const Opened opened = open_all(files);
  for (size_t f = 0; f < opened.size(); ++f) check_bytes(*opened[f], f);
  // And there is room for others, after the limit has been met once.
  const UniqueFd one(::open("/dev/null", O_RDONLY)), two(::open("/dev/null", O_RDONLY));
  CHECK(one && two);
  for (size_t f = 0; f < opened.size(); ++f) check_bytes(*opened[f], f);
}

TEST(one_descriptor_is_enough_for_many_threads) {
  if (kNeedsDescriptors) return;
  const auto files = make_files(12);
  const Opened opened = open_all(files);
  const Limit limit(256);
  std::vector<UniqueFd> others;
  const auto fill = [&] {
    while (true) {
      UniqueFd fd(::open("/dev/null", O_RDONLY | O_CLOEXEC));
      if (!fd) return;
      others.push_back(std::move(fd));
    }
  };
  fill();
  CHECK(!UniqueFd(::open("/dev/null", O_RDONLY | O_CLOEXEC)));
  File::open(files[0]->path);  // closes half of ours
  fill();
  File::open(files[0]->path);
  fill();
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < 60; ++i) {
        const size_t f = (i * 7 + static_cast<size_t>(t)) % opened.size();
        check_bytes(*opened[f], f);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(no_descriptor_at_all_is_said) {
  if (kNeedsDescriptors) return;
  const auto files = make_files(1);
  const Limit limit(256);
  std::vector<UniqueFd> others;
  while (others.empty() || others.back()) others.emplace_back(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  CHECK_THROWS(File::open(files[0]->path), Error,
               error.kind == ErrorKind::open && error.context.error_number == EMFILE);
}

// What became of the name while the file was closed.
TEST(a_file_that_was_closed_must_be_the_same) {
  struct Row {
    const char* what;
    std::function<void(const std::string& path)> change;
    const char* message;  // null: it is the same
    int error_number;
  };
  const Row rows[] = {
      {"nothing", [](const std::string&) {}, nullptr, 0},
      {"renamed while it was open", nullptr, nullptr, 0},
      {"chmod", [](const std::string& path) { ::chmod(path.c_str(), 0400); }, nullptr, 0},
      {"replaced",
       [](const std::string& path) {
         const TemporaryFile other(1, {1000});
         CHECK(::rename(other.path.c_str(), path.c_str()) == 0);
       },
       "another file has its name", 0},
      {"deleted", [](const std::string& path) { ::unlink(path.c_str()); }, "cannot open the file again", ENOENT},
      {"truncated", [](const std::string& path) { CHECK(::truncate(path.c_str(), 10) == 0); }, "was changed", 0},
      {"touched",
       [](const std::string& path) {
         const struct timespec times[2] = {{5, 0}, {5, 0}};
         CHECK(::utimensat(AT_FDCWD, path.c_str(), times, 0) == 0);
       },
       "was changed", 0},
      {"a folder now",
       [](const std::string& path) {
         ::unlink(path.c_str());
         CHECK(::mkdir(path.c_str(), 0700) == 0);
       },
       "", 0},
  };
  for (const Row& row : rows) {
    std::printf("  %s\n", row.what);
    const auto files = make_files(1);
    const auto more = make_files(20);
    const std::string path = files[0]->path;
    const auto file = File::open(path);
    if (!row.change) CHECK(::rename(path.c_str(), (path + "-moved").c_str()) == 0);
    {
      const Limit limit(24);
      open_all(more);  // two rounds: who was used since the last look has a second chance
      open_all(more);
    }
    if (row.change) row.change(path);
    const auto is_told = [&](const Error& error) {
      return error.kind == ErrorKind::read && error.context.path == path &&
             error.context.error_number == row.error_number && error.message.find("`ulimit -n`") != std::string::npos &&
             error.message.find(row.message) != std::string::npos;
    };
    if (row.message) {
      CHECK_THROWS(file->descriptor(), Error, is_told(error));
      CHECK_THROWS(file->require_unchanged(0), Error, is_told(error));
    } else {
      check_bytes(*file, 0);
    }
    ::rmdir(path.c_str());
    ::unlink((path + "-moved").c_str());
  }
}

TEST(a_deleted_file_is_not_closed) {
  const auto files = make_files(30);
  const Limit limit(32);
  const auto file = File::open(files[0]->path);
  ::unlink(files[0]->path.c_str());
  for (size_t f = 1; f < files.size(); ++f) File::open(files[f]->path);
  check_bytes(*file, 0);
}

TEST(a_relative_name_outlives_a_change_of_folder) {
  const auto files = make_files(30);
  const std::string folder = files[0]->path.substr(0, files[0]->path.rfind('/'));
  CHECK(::chdir(folder.c_str()) == 0);
  const Limit limit(32);
  const auto file = File::open(files[0]->path.substr(folder.size() + 1));
  CHECK(::chdir("/") == 0);
  const Opened others = open_all(files);
  check_bytes(*file, 0);
}

TEST(direct_reads_take_no_descriptor_that_files_need) {
  const auto files = make_files(40);
  const Limit limit(64);
  const size_t before = open_descriptors();
  const Opened opened = open_all(files);
  std::vector<std::unique_ptr<const DirectFile>> direct;
  for (const auto& file : opened) direct.push_back(DirectFile::open(*file, true));
  CHECK(open_descriptors() <= before + 32);
  direct.clear();
  for (size_t f = 0; f < opened.size(); ++f) check_bytes(*opened[f], f);
}

TEST(a_forked_child_opens_files_again) {
  const auto files = make_files(40);
  const Limit limit(64);
  const Opened opened = open_all(files);
  std::atomic<bool> stop{false};
  std::thread busy([&] {  // whose leases and mutex the child finds as they are
    while (!stop)
      for (size_t f = 0; f < opened.size(); ++f) check_bytes(*opened[f], f);
  });
  for (int round = 0; round < 10; ++round) {
    const pid_t child = ::fork();
    if (child == 0) {
      for (size_t f = 0; f < opened.size(); ++f) check_bytes(*opened[f], f);
      ::_exit(0);
    }
    int status = -1;
    CHECK(::waitpid(child, &status, 0) == child && status == 0);
  }
  stop = true;
  busy.join();
}
