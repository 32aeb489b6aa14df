#pragma once
#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/look.h"
#include "base/unique_fd.h"

namespace weightload {

// How long nothing may come, and how often a wait looks whether it is still wanted.
struct Patience {
  std::chrono::milliseconds limit;
  std::chrono::milliseconds between_looks;
};

// A connection by TCP, for one request after the other, whose answers each have a head that ends with an empty line.
// One thread at a time. Where something fails the answer is false, and the connection is of no more use: nothing is
// told of why. What a look throws comes through.
class Connection {
 public:
  // Begins to connect to a numeric address, and waits for nothing.
  Connection(const std::string& address, uint16_t port);

  // Waits until it is connected, and sends all of this.
  bool send(std::string_view text, const Patience& patience, const Look& look);

  // Fills `head` up to its end, the empty line included. Twice the patience for all of it.
  bool receive_head(std::string& head, const Patience& patience, const Look& look);

  // Fills [destination, destination + count) with what comes next.
  bool receive(void* destination, size_t count, const Patience& patience, const Look& look);

  // Open, and nothing has come that nobody has asked for.
  bool is_quiet() const;

 private:
  ssize_t take(void* destination, size_t count) const;
  bool wait_for(short events, const Patience& patience, const Look& look) const;
  void wake_at(size_t bytes);

  UniqueFd socket_;
  std::string behind_head_;  // of the body, which has come with the head
  size_t wakes_at_ = 1;      // bytes
};

}  // namespace weightload
