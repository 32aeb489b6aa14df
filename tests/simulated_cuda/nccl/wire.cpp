#include "wire.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <map>
#include <stdexcept>
#include <thread>

namespace simulated_nccl {
namespace {

constexpr std::chrono::seconds kPatience{300};

sockaddr_un address_of(const std::string& name, int rank, socklen_t* size) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string text = "weightload-nccl-" + name + "-" + std::to_string(rank);
  // A name that begins with zero lies in no folder and ends with its socket.
  std::memcpy(address.sun_path + 1, text.data(), text.size());
  *size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  return address;
}

void all(int socket, void* data, size_t bytes, bool out) {
  char* at = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t moved = out ? ::send(socket, at, bytes, MSG_NOSIGNAL) : ::recv(socket, at, bytes, 0);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) throw std::runtime_error("a rank has gone while a communicator was made");
    at += moved;
    bytes -= static_cast<size_t>(moved);
  }
}

// One side of a connection: transfers in order, the label of each before its bytes.
struct Queue {
  std::deque<Transfer> transfers;
  size_t moved = 0;  // of the first one's label and bytes
  Label came;
};

enum class Step { more, blocked, gone, mismatch };

Step advance(Queue& queue, int socket, bool out) {
  while (!queue.transfers.empty()) {
    Transfer& first = queue.transfers.front();
    const size_t total = sizeof(Label) + first.label.bytes;
    if (queue.moved == total) {
      queue.transfers.pop_front();
      queue.moved = 0;
      continue;
    }
    char* at;
    size_t count;
    if (queue.moved < sizeof(Label)) {
      at = reinterpret_cast<char*>(out ? &first.label : &queue.came) + queue.moved;
      count = sizeof(Label) - queue.moved;
    } else {
      at = first.data + (queue.moved - sizeof(Label));
      count = total - queue.moved;
    }
    const ssize_t moved =
        out ? ::send(socket, at, count, MSG_NOSIGNAL | MSG_DONTWAIT) : ::recv(socket, at, count, MSG_DONTWAIT);
    if (moved < 0 && errno == EINTR) continue;
    if (moved < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return Step::blocked;
    if (moved <= 0) return Step::gone;
    queue.moved += static_cast<size_t>(moved);
    if (!out && queue.moved == sizeof(Label) && !(queue.came == first.label)) return Step::mismatch;
  }
  return Step::more;
}

}  // namespace

Wire::Wire(const std::string& name, int rank, int ranks)
    : rank_(rank), ranks_(ranks), sockets_(static_cast<size_t>(ranks), -1), wake_(::eventfd(0, EFD_CLOEXEC)) {
  socklen_t size = 0;
  const sockaddr_un mine = address_of(name, rank, &size);
  const int door = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (door < 0 || ::bind(door, reinterpret_cast<const sockaddr*>(&mine), size) != 0 || ::listen(door, ranks) != 0) {
    throw std::runtime_error(std::string("a communicator's socket: ") + std::strerror(errno));
  }
  const auto end = std::chrono::steady_clock::now() + kPatience;
  for (int peer = 0; peer < rank; ++peer) {
    const sockaddr_un theirs = address_of(name, peer, &size);
    while (true) {
      const int socket = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
      if (::connect(socket, reinterpret_cast<const sockaddr*>(&theirs), size) == 0) {
        sockets_[static_cast<size_t>(peer)] = socket;
        break;
      }
      ::close(socket);
      if (std::chrono::steady_clock::now() > end) throw std::runtime_error("a rank did not come");
      std::this_thread::sleep_for(std::chrono::milliseconds(2));  // not bound yet
    }
    int32_t number = rank;
    all(sockets_[static_cast<size_t>(peer)], &number, sizeof number, true);
  }
  for (int missing = ranks - 1 - rank; missing > 0; --missing) {
    pollfd waiting{door, POLLIN, 0};
    if (::poll(&waiting, 1, static_cast<int>(kPatience.count() * 1000)) <= 0)
      throw std::runtime_error("a rank did not come");
    const int socket = ::accept4(door, nullptr, nullptr, SOCK_CLOEXEC);
    int32_t number = 0;
    all(socket, &number, sizeof number, false);
    sockets_.at(static_cast<size_t>(number)) = socket;
  }
  ::close(door);
}

Wire::~Wire() {
  for (const int socket : sockets_)
    if (socket >= 0) ::close(socket);
  ::close(wake_);
}

void Wire::abort() {
  aborted_ = true;
  const uint64_t one = 1;
  if (::write(wake_, &one, sizeof one) < 0) throw std::runtime_error("abort");
  for (const int socket : sockets_)
    if (socket >= 0) ::shutdown(socket, SHUT_RDWR);
}

void Wire::wait_for_abort() {
  pollfd forever{wake_, POLLIN, 0};
  while (!aborted_) ::poll(&forever, 1, -1);
}

Outcome Wire::run(const std::vector<Transfer>& transfers, bool lost_ends, std::string* why) {
  std::map<std::pair<int, bool>, Queue> queues;
  for (const Transfer& transfer : transfers) queues[{transfer.peer, transfer.out}].transfers.push_back(transfer);
  while (!aborted_) {
    std::vector<pollfd> waiting{{wake_, POLLIN, 0}};
    for (auto it = queues.begin(); it != queues.end();) {
      const auto [peer, out] = it->first;
      const int socket = sockets_[static_cast<size_t>(peer)];
      const Step step = advance(it->second, socket, out);
      if (step == Step::mismatch) {
        *why = "rank " + std::to_string(peer) + " is at another operation, or one of another size";
        return Outcome::mismatch;
      }
      if (step == Step::gone && !aborted_) {
        *why = "rank " + std::to_string(peer) + " has gone";
        if (lost_ends) return Outcome::lost;
        wait_for_abort();
        return Outcome::aborted;
      }
      if (step == Step::more) {
        it = queues.erase(it);
        continue;
      }
      waiting.push_back({socket, static_cast<short>(out ? POLLOUT : POLLIN), 0});
      ++it;
    }
    if (queues.empty()) return Outcome::done;
    ::poll(waiting.data(), waiting.size(), -1);
  }
  return Outcome::aborted;
}

std::vector<int64_t> Wire::exchange(const std::vector<int64_t>& mine) {
  // So few bytes that sending never waits for the other side to read.
  std::vector<int64_t> everyones(mine.size() * static_cast<size_t>(ranks_));
  const size_t bytes = mine.size() * sizeof(int64_t);
  std::vector<int64_t> copy = mine;
  for (int peer = 0; peer < ranks_; ++peer)
    if (peer != rank_) all(sockets_[static_cast<size_t>(peer)], copy.data(), bytes, true);
  for (int peer = 0; peer < ranks_; ++peer) {
    int64_t* const to = everyones.data() + static_cast<size_t>(peer) * mine.size();
    if (peer == rank_)
      std::memcpy(to, mine.data(), bytes);
    else
      all(sockets_[static_cast<size_t>(peer)], to, bytes, false);
  }
  return everyones;
}

}  // namespace simulated_nccl
