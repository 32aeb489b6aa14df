#include "file/connection.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>

#include "base/coarse_clock.h"

namespace weightload {
namespace {

// Of what is still to come, so much wakes the thread: each time costs a system call and two switches.
constexpr size_t kWorthWaking = 256 << 10;
constexpr size_t kMostHead = 64 << 10;
constexpr std::string_view kEndOfHead = "\r\n\r\n";

// Line feeds alone end lines, and a head, for some: not to be told what is head and what is body.
bool has_bare_line_feed(std::string_view text) {
  for (size_t at = text.find('\n'); at != std::string_view::npos; at = text.find('\n', at + 1)) {
    if (at == 0 || text[at - 1] != '\r') return true;
  }
  return false;
}

bool may_come_later(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

}  // namespace

Connection::Connection(const std::string& address, uint16_t port) {
  struct addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;  // so that nobody is asked
  struct addrinfo* found = nullptr;
  if (::getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) return;
  const std::unique_ptr<struct addrinfo, decltype(&::freeaddrinfo)> held(found, ::freeaddrinfo);
  socket_ = UniqueFd(::socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket_) return;
  const int yes = 1;
  static_cast<void>(::setsockopt(socket_.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes));
  if (::connect(socket_.get(), found->ai_addr, found->ai_addrlen) != 0 && errno != EINPROGRESS) socket_ = UniqueFd();
}

bool Connection::wait_for(short events, const Patience& patience, const Look& look) const {
  const auto begin = coarse_now();
  struct pollfd waits{socket_.get(), events, 0};
  while (true) {
    const int ready = ::poll(&waits, 1, static_cast<int>(patience.between_looks.count()));
    if (ready > 0) return true;  // an error is one, too: who reads or writes is told
    if (ready < 0 && errno != EINTR) return false;
    look();
    if (coarse_now() - begin > patience.limit) return false;
  }
}

bool Connection::send(std::string_view text, const Patience& patience, const Look& look) {
  if (!socket_) return false;
  while (!text.empty()) {
    const ssize_t sent = ::send(socket_.get(), text.data(), text.size(), MSG_NOSIGNAL);
    if (sent >= 0) {
      text.remove_prefix(static_cast<size_t>(sent));
    } else if (errno == ENOTCONN || may_come_later(errno)) {  // as long as it is connecting
      if (!wait_for(POLLOUT, patience, look)) return false;
      int failed = 0;
      socklen_t size = sizeof failed;
      if (::getsockopt(socket_.get(), SOL_SOCKET, SO_ERROR, &failed, &size) != 0 || failed != 0) return false;
    } else {
      return false;
    }
  }
  return true;
}

ssize_t Connection::take(void* destination, size_t count) const {
  return ::recv(socket_.get(), destination, count, MSG_DONTWAIT);
}

bool Connection::receive_head(std::string& head, const Patience& patience, const Look& look) {
  const auto begin = coarse_now();
  wake_at(1);
  std::array<char, 8192> came{};
  std::string all;
  while (true) {
    if (!wait_for(POLLIN, patience, look)) return false;
    const ssize_t count = take(came.data(), came.size());
    if (count < 0 && may_come_later(errno)) continue;
    if (count <= 0) return false;
    // The end may have begun in what came before.
    const size_t from = all.size() < kEndOfHead.size() ? 0 : all.size() - kEndOfHead.size() + 1;
    all.append(came.data(), static_cast<size_t>(count));
    const size_t end = all.find(kEndOfHead, from);
    if (has_bare_line_feed(std::string_view(all).substr(0, end))) return false;
    if (end != std::string::npos) {
      behind_head_ = all.substr(end + kEndOfHead.size());
      all.resize(end + kEndOfHead.size());
      head = std::move(all);
      return true;
    }
    look();
    if (all.size() > kMostHead || coarse_now() - begin > 2 * patience.limit) return false;
  }
}

// Where a system refuses, each packet wakes.
void Connection::wake_at(size_t bytes) {
  bytes = std::clamp<size_t>(bytes, 1, kWorthWaking);
  if (bytes == wakes_at_) return;
  const int count = static_cast<int>(bytes);
  static_cast<void>(::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVLOWAT, &count, sizeof count));
  wakes_at_ = bytes;
}

bool Connection::receive(void* destination, size_t count, const Patience& patience, const Look& look) {
  if (behind_head_.size() > count) return false;  // more than it said
  char* at = static_cast<char*>(destination);
  std::memcpy(at, behind_head_.data(), behind_head_.size());
  at += behind_head_.size();
  count -= behind_head_.size();
  behind_head_.clear();
  auto looked = coarse_now();
  bool was_late = false;  // the limit is over, for what wakes it: less may have come
  while (count > 0) {
    const ssize_t came = take(at, count);
    if (came > 0) {
      at += came;
      count -= static_cast<size_t>(came);
      wake_at(was_late ? 1 : count);
      was_late = false;
    } else if (came == 0 || !may_come_later(errno) || was_late) {
      return false;
    } else {
      was_late = !wait_for(POLLIN, patience, look);
    }
    if (const auto now = coarse_now(); now - looked >= patience.between_looks) {
      looked = now;
      look();
    }
  }
  return true;
}

bool Connection::is_quiet() const {
  char one = 0;
  return socket_ && ::recv(socket_.get(), &one, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && may_come_later(errno);
}

}  // namespace weightload
