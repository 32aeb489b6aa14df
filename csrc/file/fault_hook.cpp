#include "file/fault_hook.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>
#include <optional>
#include <thread>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace weightload::fault_hook {
namespace {

std::atomic<bool> armed{false};
std::mutex mutex;  // guards the two below
Plan current;
uint64_t calls = 0;

// The fault this call is to suffer, if any.
std::optional<Plan> next_fault(Calls calls_of = Calls::reads) {
  if (!armed.load(std::memory_order_relaxed)) return std::nullopt;
  std::lock_guard<std::mutex> lock(mutex);
  if (current.calls != calls_of) return std::nullopt;
  const uint64_t call = calls++;
  if (call < current.first || call - current.first >= current.count) return std::nullopt;
  return current;
}

template <typename Call>
int status_call(Call&& call) {
  if (const auto plan = next_fault(Calls::statuses)) {
    if (plan->fault == Fault::error) return errno = plan->error_number, -1;
    if (plan->fault == Fault::interrupt) return errno = EINTR, -1;
    if (plan->fault == Fault::delay) std::this_thread::sleep_for(plan->delay);
  }
  return call();
}

}  // namespace

void arm(const Plan& plan) {
  std::lock_guard<std::mutex> lock(mutex);
  current = plan;
  calls = 0;
  armed.store(true, std::memory_order_relaxed);
}

void disarm() { armed.store(false, std::memory_order_relaxed); }

uint64_t calls_since_armed() {
  std::lock_guard<std::mutex> lock(mutex);
  return calls;
}

ssize_t pread(int fd, void* destination, size_t count, off_t offset) {
  if (const auto plan = next_fault()) {
    switch (plan->fault) {
      case Fault::error: return errno = plan->error_number, -1;
      case Fault::interrupt: return errno = EINTR, -1;
      case Fault::short_read: count = count > 1 ? count / 2 : count; break;
      case Fault::end_of_file: return 0;
      case Fault::delay: std::this_thread::sleep_for(plan->delay); break;
    }
  }
  return ::pread(fd, destination, count, offset);
}

int populate(void* address, size_t length) {
  if (const auto plan = next_fault()) {
    switch (plan->fault) {
      case Fault::error: return errno = plan->error_number, -1;
      case Fault::interrupt: return errno = EINTR, -1;
      case Fault::short_read: break;
      case Fault::end_of_file: return errno = EFAULT, -1;
      case Fault::delay: std::this_thread::sleep_for(plan->delay); break;
    }
  }
  return populate_on(address, length);
}

int stat(const char* path, struct ::stat* status) {
  return status_call([&] { return ::stat(path, status); });
}

int fstat(int fd, struct ::stat* status) {
  return status_call([&] { return ::fstat(fd, status); });
}

int fstatfs(int fd, struct ::statfs* status) {
  return status_call([&] { return ::fstatfs(fd, status); });
}

int statx_of(int fd, int flags, struct ::statx* status) {
  return status_call([&] { return ::statx(fd, "", AT_EMPTY_PATH | flags, STATX_BASIC_STATS, status); });
}

int populate_on(void* address, size_t length) { return ::madvise(address, length, MADV_POPULATE_READ); }

}  // namespace weightload::fault_hook
