#include "file/open_files.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/fork_generation.h"
#include "base/of_this_process.h"

namespace weightload::open_files {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kBetweenTries = std::chrono::milliseconds(5);

// The kernel breaks a lease after /proc/sys/fs/lease-break-time, 45 s by default.
constexpr auto kMostForLease = std::chrono::seconds(60);

// For other threads to end the reads that they are at, where those are all the descriptors there are.
constexpr auto kMostForOthers = std::chrono::seconds(10);

// What another thread has just opened, or is about to close, is in no list: so long nothing to close means little.
constexpr auto kMostForUnlisted = std::chrono::milliseconds(200);

constexpr const char* kDeleted = " (deleted)";

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// The name of an open file as it is now; empty where it has none any more, or where the system does not say.
std::string name_of(int fd, bool& deleted) {
  char buffer[PATH_MAX];
  const ssize_t length = ::readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), buffer, sizeof(buffer));
  std::string name(buffer, length > 0 ? static_cast<size_t>(length) : 0);
  deleted = ends_with(name, kDeleted);
  const bool whole = !name.empty() && name.size() < sizeof(buffer) && name.front() == '/';
  return whole && !deleted ? name : std::string();
}

}  // namespace

uint64_t limit() {
  struct rlimit files;
  return ::getrlimit(RLIMIT_NOFILE, &files) == 0 ? static_cast<uint64_t>(files.rlim_cur) : UINT64_MAX;
}

struct Pool {
  const uint32_t generation = fork_generation();
  std::mutex mutex;       // guards all below
  std::list<Kept*> open;  // the least recently used first, roughly
  uint64_t extras = 0;
  uint64_t most = UINT64_MAX;  // found out where the limit was met: others have the rest
  uint64_t most_under = 0;     // the limit of then

  // With the mutex held, as what follows.
  uint64_t share() {
    const uint64_t now = limit();
    if (now != most_under) most = UINT64_MAX;
    return std::min(std::max<uint64_t>(1, now / 2), most);
  }

  // Closes idle ones until `keep` are left, or none is idle; they go when the result does, without the mutex: closing
  // may take a round trip to a server. Who was used since the last look gets a second chance.
  std::vector<UniqueFd> close_down_to(uint64_t keep) {
    std::vector<UniqueFd> closed;
    for (size_t looks = 2 * open.size(); looks > 0 && open.size() + extras > keep; --looks) {
      Kept* const oldest = open.front();
      if (!oldest->used_.exchange(false, std::memory_order_relaxed)) {
        closed.reserve(closed.size() + 1);
        if (UniqueFd fd = oldest->close_if_idle()) {
          closed.push_back(std::move(fd));
          open.pop_front();
          continue;
        }
      }
      open.splice(open.end(), open, open.begin());
    }
    return closed;
  }

  void add(Kept* kept) {
    kept->listed_ = open.insert(open.end(), kept);
    kept->generation_ = generation;
  }
};

namespace {

// In a forked child what the parent had open stays open.
Pool& pool() { return of_this_process<Pool>(); }

// Note [Descriptors and fork]
// The kernel copies a process's descriptors first and its memory later, while other threads go on: what one of them
// closes and opens in between is a number in the child's memory that stands for another file there. So while a child is
// made nothing is marked as closed or open: the forking thread holds the mutex. (A descriptor that is being closed or
// was just opened then is in no Kept, and merely stays open in the child.)
Pool* held_by_fork = nullptr;

[[maybe_unused]] const int registered = ::pthread_atfork(
    [] {
      held_by_fork = &pool();
      held_by_fork->mutex.lock();
    },
    [] { held_by_fork->mutex.unlock(); }, [] { held_by_fork->mutex.unlock(); });

enum class Room : uint8_t { made, none, in_use };

// The system has no descriptor left: half of what is kept goes, so that others find some, too.
Room make_room() {
  Pool& all = pool();
  std::vector<UniqueFd> closed;  // without the mutex, at the end
  std::lock_guard<std::mutex> lock(all.mutex);
  if (all.open.empty()) return Room::none;
  all.most = std::max<uint64_t>(1, std::min(all.most, all.open.size() + all.extras) / 2);
  all.most_under = limit();
  closed = all.close_down_to(all.open.size() > 1 ? all.most : 0);
  return closed.empty() ? Room::in_use : Room::made;
}

}  // namespace

UniqueFd open(const std::string& name, const std::function<void()>& pause) {
  const Clock::time_point begin = Clock::now();
  Clock::time_point nothing_since = begin;  // could be closed, for want of a descriptor
  while (true) {
    UniqueFd fd(::open(name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
    if (fd) return fd;
    const int error = errno;
    const Clock::duration waited = Clock::now() - begin;
    if (error == EINTR) {
      pause();
    } else if (error == EMFILE || error == ENFILE) {
      const Room room = make_room();
      if (room != Room::none) nothing_since = Clock::now();
      if (room == Room::made) continue;
      const bool nothing = Clock::now() - nothing_since > kMostForUnlisted;
      if (nothing || waited > kMostForOthers) return errno = error, UniqueFd();
      pause();
      std::this_thread::sleep_for(kBetweenTries);
    } else if (error == EAGAIN && waited < kMostForLease) {
      pause();
      std::this_thread::sleep_for(kBetweenTries);
    } else {
      return errno = error, UniqueFd();
    }
  }
}

Lease::~Lease() {
  if (kept_) kept_->state_.fetch_sub(1, std::memory_order_release);
}

Kept::Kept(UniqueFd fd) : fd_(std::move(fd)) {
  Pool& all = pool();
  std::vector<UniqueFd> closed;  // closed without the mutex
  std::lock_guard<std::mutex> lock(all.mutex);
  closed = all.close_down_to(all.share() - 1);
  all.add(this);
}

Kept::~Kept() {
  if ((state_.load(std::memory_order_relaxed) & kClosed) || generation_ != fork_generation()) return;
  Pool& all = pool();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (!(state_.load(std::memory_order_relaxed) & kClosed)) all.open.erase(listed_);
}

Lease Kept::lease() {
  if (state_.fetch_add(1, std::memory_order_acquire) & kClosed) {
    state_.fetch_sub(1, std::memory_order_relaxed);
    return {};
  }
  if (!used_.load(std::memory_order_relaxed)) used_.store(true, std::memory_order_relaxed);
  return {this, fd_.get()};
}

UniqueFd Kept::close_if_idle() {
  bool deleted = false;
  std::string name = name_of(fd_.get(), deleted);
  if (deleted) return {};   // it could not be had again
  name_ = std::move(name);  // before it counts: a child that is forked meanwhile finds all of it
  uint32_t idle = 0;
  if (!state_.compare_exchange_strong(idle, kClosed, std::memory_order_acq_rel)) return {};
  return std::move(fd_);
}

std::string Kept::name() const {
  Pool& all = pool();
  std::lock_guard<std::mutex> lock(all.mutex);
  return name_;
}

Lease Kept::put_back(UniqueFd fd) {
  Pool& all = pool();
  std::vector<UniqueFd> closed;
  std::lock_guard<std::mutex> lock(all.mutex);
  if (state_.load(std::memory_order_acquire) & kClosed) {
    closed = all.close_down_to(all.share() - 1);
    fd_ = std::move(fd);
    all.add(this);
    state_.fetch_and(~kClosed, std::memory_order_release);
  }
  // Nobody closes it as long as the mutex is held.
  state_.fetch_add(1, std::memory_order_acquire);
  used_.store(true, std::memory_order_relaxed);
  return {this, fd_.get()};
}

std::optional<Extra> Extra::take() {
  Pool& all = pool();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (all.open.size() + all.extras >= all.share()) return std::nullopt;
  ++all.extras;
  return Extra(all.generation);
}

Extra::~Extra() {
  if (!held_ || generation_ != fork_generation()) return;
  Pool& all = pool();
  std::lock_guard<std::mutex> lock(all.mutex);
  --all.extras;
}

}  // namespace weightload::open_files
