#include "memory/bus_guard.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include <cerrno>

namespace weightload {
namespace {

struct Guarded {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  volatile sig_atomic_t hit = 0;
};

// Its place is known when the thread starts: a handler must not allocate one.
__attribute__((tls_model("initial-exec"))) thread_local Guarded guarded;

// Written before the handler is installed.
struct sigaction before{};

bool put_zeros(const siginfo_t& info) {
  const auto at = reinterpret_cast<uintptr_t>(info.si_addr);
  if (info.si_code <= 0 || at < guarded.begin || at >= guarded.end) return false;
  const int saved = errno;
  void* const mapping = reinterpret_cast<void*>(guarded.begin);
  const void* const zeros = ::mmap(mapping, guarded.end - guarded.begin, PROT_READ,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, /*fd=*/-1, /*offset=*/0);
  errno = saved;
  if (zeros == MAP_FAILED) return false;
  guarded.hit = 1;
  return true;
}

void on_bus_error(int number, siginfo_t* info, void* context) {
  if (put_zeros(*info)) return;
  if ((before.sa_flags & static_cast<int>(SA_RESETHAND)) != 0) ::signal(number, SIG_DFL);
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(number, info, context);
  } else if (before.sa_handler != SIG_DFL) {
    before.sa_handler(number);
  } else {
    // The same instruction faults again, and what was sent comes again when this returns.
    ::signal(number, SIG_DFL);
    if (info->si_code <= 0) ::raise(number);
  }
}

bool is_ours() {
  struct sigaction now{};
  return ::sigaction(SIGBUS, nullptr, &now) == 0 && (now.sa_flags & SA_SIGINFO) != 0 &&
         now.sa_sigaction == &on_bus_error;
}

bool install() {
  if (::sigaction(SIGBUS, nullptr, &before) != 0 || before.sa_handler == SIG_IGN) return false;
  struct sigaction ours{};
  ours.sa_sigaction = &on_bus_error;
  // As the handler before has it: on which stack, what is blocked meanwhile, whether system calls go on.
  ours.sa_mask = before.sa_mask;
  ours.sa_flags = SA_SIGINFO | (before.sa_flags & static_cast<int>(SA_ONSTACK | SA_NODEFER | SA_RESTART));
  return ::sigaction(SIGBUS, &ours, nullptr) == 0;
}

bool is_blocked() {
  sigset_t blocked;
  return ::pthread_sigmask(SIG_SETMASK, nullptr, &blocked) != 0 || ::sigismember(&blocked, SIGBUS) != 0;
}

}  // namespace

BusGuard::BusGuard(char* begin, char* end) noexcept {
  // Not by std::call_once, which has thread-local memory of its own: where a thread cannot get that, the process ends.
  static const bool installed = install();
  guarded.hit = 0;
  armed_ = installed && is_ours() && !is_blocked();
  if (!armed_) return;
  guarded.begin = reinterpret_cast<uintptr_t>(begin);
  guarded.end = reinterpret_cast<uintptr_t>(end);
}

BusGuard::~BusGuard() { guarded.begin = guarded.end = 0; }

bool BusGuard::hit() const noexcept { return guarded.hit != 0; }

}  // namespace weightload
