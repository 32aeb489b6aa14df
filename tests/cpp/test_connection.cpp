// Connections by TCP over loopback, to a peer that sends what each test says, so that sanitizers see them.
#include "file/connection.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <functional>
#include <stdexcept>
#include <thread>

#include "check.h"

using namespace weightload;
using std::chrono::milliseconds;

namespace {

constexpr Patience kPatience{milliseconds(20'000), milliseconds(5)};
constexpr Patience kHardly{milliseconds(60), milliseconds(5)};
const std::string kRequest = "GET / HTTP/1.1\r\n\r\n";
const std::string kHead = "HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\n\r\n";

// Listens, takes one connection and its request, and then does what it is told.
class Peer {
 public:
  using Answer = std::function<void(int socket)>;

  explicit Peer(Answer answer) : listener_(::socket(AF_INET, SOCK_STREAM, 0)) {
    struct sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof at;
    CHECK(::bind(listener_.get(), reinterpret_cast<struct sockaddr*>(&at), size) == 0);
    CHECK(::listen(listener_.get(), 1) == 0);
    CHECK(::getsockname(listener_.get(), reinterpret_cast<struct sockaddr*>(&at), &size) == 0);
    port = ntohs(at.sin_port);
    thread_ = std::thread([this, answer = std::move(answer)] {
      const UniqueFd socket(::accept(listener_.get(), nullptr, nullptr));
      CHECK(socket);
      std::string request(kRequest.size(), '\0');
      CHECK(::recv(socket.get(), request.data(), request.size(), MSG_WAITALL) == static_cast<ssize_t>(request.size()));
      CHECK(request == kRequest);
      answer(socket.get());
    });
  }
  ~Peer() { thread_.join(); }

  uint16_t port = 0;

 private:
  UniqueFd listener_;
  std::thread thread_;
};

void say(int socket, const std::string& text) {
  for (size_t at = 0; at < text.size();) {
    const ssize_t sent = ::send(socket, text.data() + at, text.size() - at, MSG_NOSIGNAL);
    if (sent <= 0) return;  // nobody wants it any more
    at += static_cast<size_t>(sent);
  }
}

// Until the other side has closed.
void wait_for_end(int socket) {
  char byte;
  while (::recv(socket, &byte, 1, 0) > 0) {
  }
}

bool ask(Connection& connection) { return connection.send(kRequest, kPatience, no_look); }

}  // namespace

TEST(heads_that_are_cut_anywhere) {
  for (size_t cut = 0; cut <= kHead.size() + 5; ++cut) {
    const std::string all = kHead + "12345";
    std::atomic<bool> goes_on{false};
    Peer peer([&](int socket) {
      say(socket, all.substr(0, cut));
      while (!goes_on) std::this_thread::yield();
      say(socket, all.substr(cut));
      wait_for_end(socket);
    });
    Connection connection("127.0.0.1", peer.port);
    CHECK(ask(connection));
    std::string head;
    CHECK(connection.receive_head(head, kPatience, [&] { goes_on = true; }) || cut == 0);
    goes_on = true;
    CHECK(head == kHead);
    char body[5];
    CHECK(connection.receive(body, 5, kPatience, no_look));
    CHECK(std::string(body, 5) == "12345");
    CHECK(connection.is_quiet());
  }
}

TEST(bodies_of_all_sizes_in_small_and_large_pieces) {
  for (const size_t size : {size_t{0}, size_t{1}, size_t{8192}, size_t{300'000}, size_t{5'000'001}}) {
    std::string body(size, '\0');
    for (size_t i = 0; i < size; ++i) body[i] = static_cast<char>(i * 31 >> 3);
    for (const size_t piece : {size_t{999}, size_t{100'000}, size_t{10'000'000}}) {
      if (size > 1'000'000 && piece < 1000) continue;
      Peer peer([&](int socket) {
        say(socket, kHead);
        for (size_t at = 0; at < size; at += piece) say(socket, body.substr(at, piece));
        wait_for_end(socket);
      });
      Connection connection("127.0.0.1", peer.port);
      CHECK(ask(connection));
      std::string head, got(size, 'x');
      CHECK(connection.receive_head(head, kPatience, no_look) && head == kHead);
      CHECK(connection.receive(got.data(), size, kPatience, no_look));
      CHECK(got == body);
    }
  }
}

TEST(answers_that_end_early) {
  for (const size_t bytes : {size_t{0}, size_t{7}, kHead.size() - 1, kHead.size(), kHead.size() + 4}) {
    for (const bool reset : {false, true}) {
      Peer peer([&](int socket) {
        say(socket, (kHead + "12345").substr(0, bytes));
        if (!reset) return;
        const struct linger at_once{1, 0};
        ::setsockopt(socket, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
      });
      Connection connection("127.0.0.1", peer.port);
      CHECK(ask(connection));
      std::string head;
      char body[5];
      const bool has_head = connection.receive_head(head, kPatience, no_look);
      CHECK(!has_head || bytes >= kHead.size());
      CHECK(!has_head || !connection.receive(body, 5, kPatience, no_look));
      CHECK(!connection.is_quiet());
    }
  }
}

TEST(heads_that_are_refused) {
  const std::string bare = "HTTP/1.1 206 Partial Content\nContent-Length: 5\r\n\r\n";
  for (const std::string& text : {bare, "\n" + kHead, std::string(100'000, 'a'), "a: " + std::string(70'000, 'b')}) {
    Peer peer([&](int socket) {
      say(socket, text);
      wait_for_end(socket);
    });
    Connection connection("127.0.0.1", peer.port);
    CHECK(ask(connection));
    std::string head;
    CHECK(!connection.receive_head(head, kPatience, no_look));
  }
}

TEST(more_than_was_asked_for) {
  Peer peer([&](int socket) {
    say(socket, kHead + "123456");
    wait_for_end(socket);
  });
  Connection connection("127.0.0.1", peer.port);
  CHECK(ask(connection));
  std::string head;
  CHECK(connection.receive_head(head, kPatience, no_look));
  char body[6];
  // The sixth byte has come with the head, or comes behind the body: it is not taken for another answer's.
  const bool taken = connection.receive(body, 5, kPatience, no_look);
  while (taken && connection.is_quiet()) std::this_thread::yield();
  CHECK(!taken || !connection.is_quiet());
}

TEST(a_peer_that_says_nothing) {
  for (const std::string& before : {std::string(), kHead.substr(0, 9), kHead + "12"}) {
    Peer peer([&](int socket) {
      say(socket, before);
      wait_for_end(socket);
    });
    Connection connection("127.0.0.1", peer.port);
    CHECK(ask(connection));
    std::string head;
    char body[5];
    int looks = 0;
    const bool has_head = connection.receive_head(head, kHardly, [&] { ++looks; });
    CHECK(has_head == (before.size() > kHead.size()));
    if (has_head) CHECK(!connection.receive(body, 5, kHardly, [&] { ++looks; }));
    CHECK(looks > 0);
  }
}

TEST(what_a_look_throws_comes_through) {
  for (const bool in_body : {false, true}) {
    Peer peer([&](int socket) {
      if (in_body) say(socket, kHead + "12");
      wait_for_end(socket);
    });
    Connection connection("127.0.0.1", peer.port);
    CHECK(ask(connection));
    const Look stopped = [] { throw std::runtime_error("stopped"); };
    std::string head;
    char body[5];
    if (in_body) {
      CHECK(connection.receive_head(head, kPatience, no_look));
      CHECK_THROWS(connection.receive(body, 5, kPatience, stopped), std::runtime_error,
                   error.what() == std::string("stopped"));
    } else {
      CHECK_THROWS(connection.receive_head(head, kPatience, stopped), std::runtime_error,
                   error.what() == std::string("stopped"));
    }
  }
}

TEST(signals_while_it_waits) {
  struct sigaction nothing{}, before{};
  nothing.sa_handler = [](int) {};  // without SA_RESTART
  ::sigaction(SIGUSR1, &nothing, &before);
  std::atomic<bool> over{false}, goes_on{false};
  Peer peer([&](int socket) {
    while (!goes_on) std::this_thread::yield();
    for (const char byte : kHead + "12345") {
      say(socket, std::string(1, byte));
      ::usleep(200);
    }
    wait_for_end(socket);
  });
  const pthread_t here = ::pthread_self();
  std::thread disturbing([&] {
    while (!over) {
      ::pthread_kill(here, SIGUSR1);
      ::usleep(100);
    }
  });
  {
    Connection connection("127.0.0.1", peer.port);
    CHECK(ask(connection));
    std::string head;
    char body[5];
    CHECK(connection.receive_head(head, kPatience, [&] { goes_on = true; }));
    CHECK(connection.receive(body, 5, kPatience, no_look));
    CHECK(std::string(body, 5) == "12345");
    over = true;
    disturbing.join();
  }
  ::sigaction(SIGUSR1, &before, nullptr);
}

TEST(nobody_is_there) {
  uint16_t port = 0;
  {
    const UniqueFd taken(::socket(AF_INET, SOCK_STREAM, 0));
    struct sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof at;
    CHECK(::bind(taken.get(), reinterpret_cast<struct sockaddr*>(&at), size) == 0);
    CHECK(::getsockname(taken.get(), reinterpret_cast<struct sockaddr*>(&at), &size) == 0);
    port = ntohs(at.sin_port);  // bound, and nobody listens
    Connection connection("127.0.0.1", port);
    CHECK(!connection.send(kRequest, kPatience, no_look));
    CHECK(!connection.is_quiet());
  }
  Connection no_address("localhost", port);  // a name, which would have to be asked for
  CHECK(!no_address.send(kRequest, kPatience, no_look));
}

TEST(one_request_after_the_other) {
  Peer peer([&](int socket) {
    for (int round = 0; round < 50; ++round) {
      if (round > 0) {
        std::string request(kRequest.size(), '\0');
        CHECK(::recv(socket, request.data(), request.size(), MSG_WAITALL) == static_cast<ssize_t>(request.size()));
      }
      say(socket, kHead + "1234" + static_cast<char>('A' + round % 26));
    }
    wait_for_end(socket);
  });
  Connection connection("127.0.0.1", peer.port);
  for (int round = 0; round < 50; ++round) {
    CHECK(ask(connection));
    std::string head;
    char body[5];
    CHECK(connection.receive_head(head, kPatience, no_look) && head == kHead);
    CHECK(connection.receive(body, 5, kPatience, no_look));
    CHECK(body[4] == 'A' + round % 26);
    CHECK(connection.is_quiet());
  }
}
