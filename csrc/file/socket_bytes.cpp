#include "file/socket_bytes.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "base/coarse_clock.h"

namespace weightload {
namespace {

// Of what is still to come, so much wakes the thread: each time costs a system call and two switches.
constexpr size_t kWorthWaking = 256 << 10;

// Where a system refuses, each packet wakes.
void wake_at(int socket, size_t bytes) {
  const int count = static_cast<int>(std::clamp<size_t>(bytes, 1, kWorthWaking));
  static_cast<void>(::setsockopt(socket, SOL_SOCKET, SO_RCVLOWAT, &count, sizeof count));
}

}  // namespace

bool wait_for_bytes(int socket, const Patience& patience, const Look& look) {
  const auto begin = coarse_now();
  struct pollfd waits{socket, POLLIN, 0};
  while (true) {
    const int ready = ::poll(&waits, 1, static_cast<int>(patience.between_looks.count()));
    if (ready > 0) return true;  // an error is one, too: who reads is told
    if (ready < 0 && errno != EINTR) return false;
    look();
    if (coarse_now() - begin > patience.limit) return false;
  }
}

bool receive(int socket, void* destination, size_t count, const Patience& patience, const Look& look) {
  char* at = static_cast<char*>(destination);
  auto looked = coarse_now();
  bool wakes_at_once = true;
  while (count > 0) {
    const ssize_t came = ::recv(socket, at, count, MSG_DONTWAIT);
    if (came == 0) return false;
    if (came < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) return false;
      if (!wait_for_bytes(socket, patience, look)) return false;
      continue;
    }
    at += came;
    count -= static_cast<size_t>(came);
    if (count > 0 && (wakes_at_once || count < kWorthWaking)) {
      wake_at(socket, count);
      wakes_at_once = false;
    }
    if (const auto now = coarse_now(); now - looked >= patience.between_looks) {
      looked = now;
      look();
    }
  }
  if (!wakes_at_once) wake_at(socket, 1);  // for the next answer's head
  return true;
}

}  // namespace weightload
