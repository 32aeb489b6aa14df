// Copies past the caches have all bytes, and a file that shrinks under one is no end of the process.
#include "page_cache/mapped_copy.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "base/unique_fd.h"
#include "check.h"
#include "file/fault_hook.h"
#include "memory/backed_pages.h"
#include "memory/bus_guard.h"
#include "memory/stream_copy.h"

using namespace weightload;

namespace {

const size_t kPage = static_cast<size_t>(::sysconf(_SC_PAGESIZE));

std::string counted(size_t size) {
  std::string bytes(size, '\0');
  for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(i * 131 + i / 256);
  return bytes;
}

struct OnDisk {
  explicit OnDisk(size_t size) : bytes(counted(size)), fd(::mkstemp(name.data())) {
    CHECK(fd.get() >= 0);
    CHECK(::write(fd.get(), bytes.data(), size) == static_cast<ssize_t>(size));
    file = File::open(name);
  }
  ~OnDisk() { ::unlink(name.c_str()); }
  void truncate(uint64_t size) const { CHECK(::ftruncate(fd.get(), static_cast<off_t>(size)) == 0); }

  std::string name = "/tmp/mapped_copy_XXXXXX";
  std::string bytes;
  UniqueFd fd;
  std::shared_ptr<const File> file;
};

// Two pages of a file that has only one, mapped.
struct Shrunk {
  Shrunk() : fd(::memfd_create("shrunk", MFD_CLOEXEC)) {
    CHECK(::ftruncate(fd.get(), static_cast<off_t>(2 * kPage)) == 0);
    void* const mapping = ::mmap(nullptr, 2 * kPage, PROT_READ, MAP_PRIVATE, fd.get(), 0);
    CHECK(mapping != MAP_FAILED);
    begin = static_cast<char*>(mapping);
    CHECK(::ftruncate(fd.get(), static_cast<off_t>(kPage)) == 0);
  }
  ~Shrunk() { ::munmap(begin, 2 * kPage); }
  char* end() const { return begin + 2 * kPage; }
  char touch() const { return *static_cast<volatile char*>(begin + kPage + 17); }

  UniqueFd fd;
  char* begin = nullptr;
};

void guard_something() {
  const Shrunk file;
  const BusGuard guard(file.begin, file.end());
  CHECK(guard.is_armed());
  CHECK(file.touch() == 0);
  CHECK(guard.hit());
}

// Runs it in a process of its own, in which nobody has guarded anything yet. Its wait status.
int in_child(const std::function<void()>& scenario) {
  const pid_t child = ::fork();
  CHECK(child >= 0);
  if (child == 0) {
    scenario();
    ::_exit(99);
  }
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child);
  return status;
}

void exit_with_seven(int) { ::_exit(7); }
void exit_with_eight(int, siginfo_t*, void*) { ::_exit(8); }

void handle(void (*plain)(int), void (*full)(int, siginfo_t*, void*)) {
  struct sigaction action{};
  if (full) {
    action.sa_sigaction = full;
    action.sa_flags = SA_SIGINFO;
  } else {
    action.sa_handler = plain;
  }
  CHECK(::sigaction(SIGBUS, &action, nullptr) == 0);
}

}  // namespace

// First, while this process has no handler.
TEST(what_is_not_guarded_ends_the_process_as_ever) {
  const int status = in_child([] {
    handle(SIG_DFL, nullptr);
    guard_something();
    Shrunk().touch();
  });
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
}

TEST(memory_beside_what_is_guarded_is_not_guarded) {
  const int status = in_child([] {
    handle(SIG_DFL, nullptr);
    const Shrunk file, other;
    const BusGuard guard(file.begin, file.end());
    other.touch();
  });
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
}

TEST(a_signal_that_is_sent_ends_the_process_as_ever) {
  const int status = in_child([] {
    handle(SIG_DFL, nullptr);
    guard_something();
    ::kill(::getpid(), SIGBUS);
  });
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
}

TEST(handlers_from_before_get_what_is_not_ours) {
  int status = in_child([] {
    handle(exit_with_seven, nullptr);
    guard_something();
    Shrunk().touch();
  });
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
  status = in_child([] {
    handle(nullptr, exit_with_eight);
    guard_something();
    ::kill(::getpid(), SIGBUS);
  });
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 8);
}

// Handlers that have asked for something get it: to be called once, to be left by a jump.
TEST(handlers_from_before_are_called_as_they_were_installed) {
  int status = in_child([] {
    static int calls = 0;
    struct sigaction action{};
    action.sa_handler = [](int) {
      if (++calls == 2) ::_exit(1);
    };
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    CHECK(::sigaction(SIGBUS, &action, nullptr) == 0);
    guard_something();
    Shrunk().touch();
  });
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
#ifndef __SANITIZE_THREAD__  // which calls handlers itself, and knows nothing of those that are left by a jump
  status = in_child([] {
    static jmp_buf out;
    static volatile int jumps = 0;
    struct sigaction action{};
    action.sa_handler = [](int) { ::_longjmp(out, 1); };
    action.sa_flags = SA_NODEFER;
    CHECK(::sigaction(SIGBUS, &action, nullptr) == 0);
    guard_something();
    const Shrunk file;
    if (::_setjmp(out) != 0) jumps = jumps + 1;
    if (jumps < 3) file.touch();
    ::_exit(jumps);
  });
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 3);
#endif
}

TEST(a_system_call_is_broken_off_where_it_was_before) {
  const int status = in_child([] {
    handle([](int) {}, nullptr);
    guard_something();
    struct sigaction now{};
    CHECK(::sigaction(SIGBUS, nullptr, &now) == 0);
    ::_exit((now.sa_flags & (SA_RESTART | SA_ONSTACK | SA_NODEFER)) == 0 ? 5 : 6);
  });
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 5);
}

TEST(where_the_signal_was_ignored_it_still_is) {
  const int status = in_child([] {
    handle(SIG_IGN, nullptr);
    const Shrunk file;
    const BusGuard guard(file.begin, file.end());
    struct sigaction now{};
    CHECK(::sigaction(SIGBUS, nullptr, &now) == 0);
    ::_exit(!guard.is_armed() && now.sa_handler == SIG_IGN ? 5 : 6);
  });
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 5);
}

TEST(nothing_is_guarded_where_another_handler_gets_the_signal) {
  const int status = in_child([] {
    guard_something();
    handle(exit_with_seven, nullptr);
    const Shrunk file;
    CHECK(!BusGuard(file.begin, file.end()).is_armed());
    Shrunk().touch();
  });
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
}

TEST(nothing_is_guarded_where_the_signal_is_blocked) {
  sigset_t bus, before;
  ::sigemptyset(&bus);
  ::sigaddset(&bus, SIGBUS);
  CHECK(::pthread_sigmask(SIG_BLOCK, &bus, &before) == 0);
  const Shrunk file;
  const bool armed = BusGuard(file.begin, file.end()).is_armed();
  CHECK(::pthread_sigmask(SIG_SETMASK, &before, nullptr) == 0);
  CHECK(!armed);
}

TEST(a_page_that_is_gone_is_zeros_and_is_said) {
  guard_something();
  guard_something();  // an earlier hit is forgotten
  const Shrunk file;
  const BusGuard guard(file.begin, file.end());
  CHECK(!guard.hit());
}

TEST(streams_copy_all_bytes_at_any_alignment) {
  const std::string from = counted(1000);
  for (size_t at = 0; at < 66; ++at) {
    for (const size_t size : {0, 1, 63, 64, 65, 127, 128, 200, 511}) {
      std::vector<char> to(700, 'x');
      stream_copy(to.data() + at, from.data() + at / 3, size);
      CHECK(std::equal(to.begin() + static_cast<ptrdiff_t>(at), to.begin() + static_cast<ptrdiff_t>(at + size),
                       from.begin() + static_cast<ptrdiff_t>(at / 3)));
      CHECK(std::count(to.begin(), to.begin() + static_cast<ptrdiff_t>(at), 'x') == static_cast<ptrdiff_t>(at));
      CHECK(std::all_of(to.begin() + static_cast<ptrdiff_t>(at + size), to.end(), [](char c) { return c == 'x'; }));
    }
  }
}

TEST(parts_of_a_range_are_copied) {
  if (!kCanStream) return;
  const OnDisk disk((5 << 20) + 123);
  LoadMappings mappings;
  const ByteRange range{777, disk.bytes.size()};
  MappedCopy copy(*disk.file, range, mappings);
  std::string to(range.size(), 'x');
  for (uint64_t at = range.begin; at < range.end;) {
    const ByteRange part{at, std::min(range.end, at + (1 << 20) + 5)};
    CHECK(copy.read(part, to.data() + (at - range.begin)));
    at = part.end;
  }
  CHECK(to == disk.bytes.substr(777));
}

TEST(small_ranges_are_not_worth_it) {
  const OnDisk disk(MappedCopy::kLeastBytes);
  LoadMappings mappings;
  MappedCopy copy(*disk.file, {1, MappedCopy::kLeastBytes}, mappings);
  std::string to(100, 'x');
  CHECK(!copy.read({1, 101}, to.data()));
  CHECK(to == std::string(100, 'x'));
}

TEST(nothing_is_mapped_any_more_where_address_space_is_short) {
  const OnDisk disk(2 << 20);
  LoadMappings mappings;
  mappings.give_up();
  std::string to(2 << 20, 'x');
  CHECK(!MappedCopy(*disk.file, {0, 2 << 20}, mappings).read({0, 2 << 20}, to.data()));
}

TEST(what_was_cut_off_is_left_to_a_read) {
  const OnDisk disk(4 << 20);
  LoadMappings mappings;
  MappedCopy copy(*disk.file, {0, 4 << 20}, mappings);
  std::string to(1 << 20, 'x');
  CHECK(copy.read({0, 1 << 20}, to.data()) == kCanStream);
  disk.truncate(2 << 20);
  CHECK(!copy.read({(2 << 20) - 5, 3 << 20}, to.data()));
  CHECK(!copy.read({0, 1 << 20}, to.data()));  // nor is anything else of it believed
}

TEST(a_refusal_to_map_ahead_is_none_to_copy) {
  if (!kCanStream) return;
  const OnDisk disk(2 << 20);
  LoadMappings mappings;
  fault_hook::Plan plan;
  plan.error_number = EPERM;
  plan.count = 1000;
  fault_hook::arm(plan);
  std::string to(1 << 20, 'x');
  CHECK(MappedCopy(*disk.file, {0, 2 << 20}, mappings).read({5, 5 + (1 << 20)}, to.data()));
  CHECK(to == disk.bytes.substr(5, 1 << 20));
  plan.error_number = EIO;  // but an error is left to the read
  fault_hook::arm(plan);
  CHECK(!MappedCopy(*disk.file, {0, 2 << 20}, mappings).read({5, 5 + (1 << 20)}, to.data()));
  fault_hook::disarm();
}

TEST(pieces_that_are_smaller_than_some_lines_are_left_to_a_read) {
  if (!kCanStream) return;
  const OnDisk disk(2 << 20);
  LoadMappings mappings;
  std::string to(1 << 20, 'x');
  CHECK(!MappedCopy(*disk.file, {0, 2 << 20}, mappings).read_pieces({0, 511}, 1024, 1000, to.data()));
  CHECK(MappedCopy(*disk.file, {0, 2 << 20}, mappings).read_pieces({0, 512}, 1024, 1000, to.data()));
  for (size_t piece = 0; piece < 1000; ++piece) CHECK(to.compare(piece * 512, 512, disk.bytes, piece * 1024, 512) == 0);
}

namespace {

char* map_pages(int flags, int fd = -1) {
  void* const memory = ::mmap(nullptr, 8 * kPage, PROT_READ | PROT_WRITE, flags, fd, 0);
  CHECK(memory != MAP_FAILED);
  ::madvise(memory, 8 * kPage, MADV_NOHUGEPAGE);
  return static_cast<char*>(memory);
}

}  // namespace

TEST(memory_is_backed_once_all_of_it_was_touched) {
  BackedPages pages;
  char* const begin = map_pages(MAP_PRIVATE | MAP_ANONYMOUS);
  CHECK(!pages.has_all(begin, 8 * kPage));
  begin[0] = 1;
  CHECK(pages.has_all(begin + 5, 10));
  CHECK(!pages.has_all(begin + 5, 2 * kPage));
  begin[2 * kPage] = 1;
  CHECK(!pages.has_all(begin + 5, 2 * kPage));  // the page between
  begin[kPage] = 1;
  CHECK(pages.has_all(begin + 5, 2 * kPage));
  CHECK(!pages.has_all(begin, 0));
  ::munmap(begin, 8 * kPage);
}

TEST(memory_of_files_and_of_several_processes_is_not_said_to_be_backed) {
  BackedPages pages;
  const UniqueFd file(::memfd_create("backed", MFD_CLOEXEC));
  CHECK(::ftruncate(file.get(), static_cast<off_t>(8 * kPage)) == 0);
  for (char* const begin : {map_pages(MAP_SHARED, file.get()), map_pages(MAP_SHARED | MAP_ANONYMOUS)}) {
    std::fill(begin, begin + 8 * kPage, 'x');
    CHECK(!pages.has_all(begin, 8 * kPage));
    ::munmap(begin, 8 * kPage);
  }
  char* const copied = map_pages(MAP_PRIVATE, file.get());
  std::fill(copied, copied + 8 * kPage, 'y');  // pages of its own from now on, as long as the file has them
  CHECK(!BackedPages().has_all(copied, 8 * kPage));
  ::munmap(copied, 8 * kPage);
}
