#include "report.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace simulated {
namespace {

std::atomic<size_t> count{0};

}  // namespace

void add_report(const std::string& line) {
  // A defect in a loop would fill the disk.
  if (count.fetch_add(1) > 200) return;
  const std::string text = "[" + std::to_string(::getpid()) + "] " + line + "\n";
  const char* const path = std::getenv("WEIGHTLOAD_SIMULATED_CUDA_REPORTS");
  const int file = path != nullptr ? ::open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644) : -1;
  // One write of O_APPEND a line: other processes' lines come before or after.
  if (::write(file >= 0 ? file : STDERR_FILENO, text.data(), text.size()) < 0) std::perror("report");
  if (file >= 0) ::close(file);
}

size_t reports() { return count.load(); }

void say_unprovided(const char* name) {
  std::fprintf(stderr, "the simulated CUDA does not provide %s\n", name);
  std::fflush(stderr);
}

}  // namespace simulated
