#pragma once
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/vfs.h>

#include <chrono>
#include <cstddef>
#include <cstdint>

namespace weightload::fault_hook {

// Injected I/O failures, for tests. Every read of a file goes through pread() or populate() below, and what is asked of
// its status through the others; when nothing is armed they cost one relaxed load more than the system call. What goes
// on with a populate() does not count. Not here are sockets (file/connection), and what asks for residency.
enum class Fault : uint8_t {
  error,        // fail with `error_number`
  interrupt,    // fail with EINTR
  short_read,   // read only the first half (at least one byte)
  end_of_file,  // report the end of the file
  delay,        // wait `delay`, then read as usual
};

enum class Calls : uint8_t { reads, statuses };

struct Plan {
  Fault fault = Fault::error;
  uint64_t first = 0;  // the first call that is hit, counted from 0 since arming
  uint64_t count = 1;  // how many calls in a row are hit
  int error_number = 0;
  std::chrono::milliseconds delay{0};
  Calls calls = Calls::reads;  // which are counted, and hit; of statuses by error, interrupt and delay
};

void arm(const Plan& plan);
void disarm();
uint64_t calls_since_armed();

ssize_t pread(int fd, void* destination, size_t count, off_t offset);

// madvise(MADV_POPULATE_READ): 0, or -1 with errno. end_of_file becomes EFAULT, as the kernel says it for pages beyond
// the end of a file; short_read is none.
int populate(void* address, size_t length);

int stat(const char* path, struct ::stat* status);
int fstat(int fd, struct ::stat* status);
int fstatfs(int fd, struct ::statfs* status);
int statx_of(int fd, int flags, struct ::statx* status);  // STATX_BASIC_STATS

// As populate(), going on with what populate() has begun: not counted, and never hit.
int populate_on(void* address, size_t length);

}  // namespace weightload::fault_hook
