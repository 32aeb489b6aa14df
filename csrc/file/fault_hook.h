#pragma once
#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>

namespace weightload::fault_hook {

// Injected I/O failures, for tests. Every read of the library goes through pread() or populate() below; when
// nothing is armed they cost one relaxed load more than the system call. What goes on with a populate() does not count.
enum class Fault : uint8_t {
  error,        // fail with `error_number`
  interrupt,    // fail with EINTR
  short_read,   // read only the first half (at least one byte)
  end_of_file,  // report the end of the file
  delay,        // wait `delay`, then read as usual
};

struct Plan {
  Fault fault = Fault::error;
  uint64_t first = 0;  // the first call that is hit, counted from 0 since arming
  uint64_t count = 1;  // how many calls in a row are hit
  int error_number = 0;
  std::chrono::milliseconds delay{0};
};

void arm(const Plan& plan);
void disarm();
uint64_t calls_since_armed();

ssize_t pread(int fd, void* destination, size_t count, off_t offset);

// madvise(MADV_POPULATE_READ): 0, or -1 with errno. end_of_file becomes EFAULT, as the kernel says it for pages beyond
// the end of a file; short_read is none.
int populate(void* address, size_t length);

// The same, going on with what populate() has begun: not counted, and never hit.
int populate_on(void* address, size_t length);

}  // namespace weightload::fault_hook
