#include "communicator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <tuple>

#include "reduce.h"

namespace simulated_nccl {
namespace {

int device_now() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

// NCCL within a node waits for ever for a peer that has gone: until somebody aborts the communicator. Between nodes it
// is told by the network.
bool lost_ends() {
  const char* const text = std::getenv("WEIGHTLOAD_SIMULATED_NCCL_LOST");
  return text != nullptr && std::strcmp(text, "error") == 0;
}

std::mutex reason_mutex;
std::string newest_reason;

char* reach(const void* pointer) { return static_cast<char*>(simulated_cuda_reach(pointer)); }

}  // namespace

// What a group of operations comes down to.
struct Communicator::Task {
  std::shared_ptr<Communicator> owner;
  uint64_t number = 0;
  std::vector<Transfer> transfers;
  std::vector<simulated_cuda_access> accesses;
  std::vector<std::function<bool()>> before, after;  // on the stream; false: not provided
  std::vector<std::unique_ptr<char[]>> scratch;
};

Communicator::Communicator(std::string name, int of_rank, int of_ranks)
    : rank(of_rank),
      ranks(of_ranks),
      device(device_now()),
      name_(std::move(name)),
      payload_(name_ + "-p", of_rank, of_ranks),
      talk_(name_ + "-t", of_rank, of_ranks),
      last_(simulated_cuda_new_clock()) {}

Communicator::~Communicator() { simulated_cuda_delete_clock(last_); }

void Communicator::plan(const Operation& o, Task& task) {
  const size_t bytes = o.count * size_of(o.type);
  const bool point_to_point = o.kind == Kind::send || o.kind == Kind::receive;
  const auto kind = static_cast<uint32_t>(o.kind == Kind::receive ? Kind::send : o.kind);
  const auto label = [&](size_t size) {
    Label made;
    made.kind = kind;
    made.type = o.type;
    made.op = static_cast<uint32_t>(o.op);
    made.root = point_to_point ? 0 : static_cast<uint32_t>(o.peer);
    made.number = point_to_point ? 0 : issued_;
    made.bytes = size;
    return made;
  };
  const auto out = [&](int peer, char* data, size_t size) {
    task.transfers.push_back({peer, true, data, label(size)});
  };
  const auto in = [&](int peer, char* data, size_t size) {
    task.transfers.push_back({peer, false, data, label(size)});
  };
  const auto reads = [&](const void* data, size_t size) { task.accesses.push_back({data, size, 0}); };
  const auto writes = [&](const void* data, size_t size) { task.accesses.push_back({data, size, 1}); };
  const auto copy = [&](char* to, const char* from, size_t size) {
    if (to != from) task.before.push_back([=] { return std::memmove(to, from, size) != nullptr; });
  };
  const auto others = [&](const std::function<void(int)>& each) {
    for (int step = 1; step < ranks; ++step) each((rank + step) % ranks);
  };
  const auto n = static_cast<size_t>(ranks), me = static_cast<size_t>(rank);
  char* const from = reach(o.from);
  char* const to = reach(o.to);
  if (!point_to_point) ++issued_;
  switch (o.kind) {
    case Kind::send:
      reads(o.from, bytes);
      out(o.peer, from, bytes);
      break;
    case Kind::receive:
      writes(o.to, bytes);
      in(o.peer, to, bytes);
      break;
    case Kind::broadcast:
      if (rank == o.peer) {
        reads(o.from, bytes);
        others([&](int peer) { out(peer, from, bytes); });
        if (o.to != o.from) writes(o.to, bytes);
        copy(to, from, bytes);
      } else {
        writes(o.to, bytes);
        in(o.peer, to, bytes);
      }
      break;
    case Kind::all_gather:
      reads(o.from, bytes);
      writes(o.to, bytes * n);
      copy(to + me * bytes, from, bytes);
      others([&](int peer) {
        out(peer, from, bytes);
        in(peer, to + static_cast<size_t>(peer) * bytes, bytes);
      });
      break;
    case Kind::gather:
      reads(o.from, bytes);
      if (rank != o.peer) {
        out(o.peer, from, bytes);
        break;
      }
      writes(o.to, bytes * n);
      copy(to + me * bytes, from, bytes);
      others([&](int peer) { in(peer, to + static_cast<size_t>(peer) * bytes, bytes); });
      break;
    case Kind::scatter:
      writes(o.to, bytes);
      if (rank != o.peer) {
        in(o.peer, to, bytes);
        break;
      }
      reads(o.from, bytes * n);
      copy(to, from + me * bytes, bytes);
      others([&](int peer) { out(peer, from + static_cast<size_t>(peer) * bytes, bytes); });
      break;
    case Kind::all_to_all:
      reads(o.from, bytes * n);
      writes(o.to, bytes * n);
      copy(to + me * bytes, from + me * bytes, bytes);
      others([&](int peer) {
        out(peer, from + static_cast<size_t>(peer) * bytes, bytes);
        in(peer, to + static_cast<size_t>(peer) * bytes, bytes);
      });
      break;
    case Kind::all_reduce:
    case Kind::reduce:
    case Kind::reduce_scatter: {
      const bool scatters = o.kind == Kind::reduce_scatter;
      const bool receives = o.kind != Kind::reduce || rank == o.peer;
      reads(o.from, scatters ? bytes * n : bytes);
      if (receives) writes(o.to, bytes);
      auto* const all = task.scratch.emplace_back(new char[std::max<size_t>(1, bytes * n)]).get();
      char* const mine = scatters ? from + me * bytes : from;
      copy(all + me * bytes, mine, bytes);
      others([&](int peer) {
        if (o.kind != Kind::reduce || peer == o.peer)
          out(peer, scatters ? from + static_cast<size_t>(peer) * bytes : from, bytes);
        if (receives) in(peer, all + static_cast<size_t>(peer) * bytes, bytes);
      });
      if (!receives) break;
      task.after.push_back([=, count = o.count, type = o.type, op = o.op] {
        std::memcpy(to, all, bytes);
        for (size_t r = 1; r < n; ++r)
          if (!reduce(to, all + r * bytes, count, type, op)) return false;
        return finish_reduce(to, count, type, op, static_cast<int>(n));
      });
      break;
    }
  }
}

ncclResult_t Communicator::issue(const std::vector<Operation>& operations) {
  auto task = std::make_unique<Task>();
  task->owner = shared_from_this();
  std::lock_guard<std::mutex> lock(mutex_);
  task->number = queued_;
  for (const Operation& operation : operations) {
    if (size_of(operation.type) == 0) return ncclInvalidArgument;
    if (operation.peer < 0 || operation.peer >= ranks) return ncclInvalidArgument;
    plan(operation, *task);
  }
  // Operations of one group are on one stream here; torch's are.
  for (const Operation& operation : operations)
    if (operation.stream != operations.front().stream) return ncclInvalidUsage;
  Task* const raw = task.get();
  const int error = simulated_cuda_enqueue(
      operations.front().stream, operations.front().kind == Kind::broadcast ? "broadcast" : "collective",
      raw->accesses.data(), raw->accesses.size(),
      [](void* data) {
        const std::unique_ptr<Task> own(static_cast<Task*>(data));
        own->owner->run(*own);
      },
      raw, last_);
  if (error != 0) return ncclUnhandledCudaError;
  ++queued_;
  static_cast<void>(task.release());
  return ncclSuccess;
}

void Communicator::run(Task& task) {
  {
    std::unique_lock<std::mutex> lock(turn_);
    next_.wait(lock, [&] { return done_ == task.number; });
  }
  move(task);
  std::lock_guard<std::mutex> lock(turn_);
  ++done_;
  next_.notify_all();
}

void Communicator::move(Task& task) {
  // After the first error a communicator moves nothing any more.
  if (error_ != ncclSuccess || payload_.aborted()) return;
  std::string why;
  Outcome outcome = Outcome::done;
  bool known = true;
  for (const auto& step : task.before) known = step() && known;
  outcome = payload_.run(task.transfers, lost_ends(), &why);
  if (outcome == Outcome::done)
    for (const auto& step : task.after) known = step() && known;
  if (!known) {
    why = "the simulated NCCL has no such reduction";
    simulated_cuda_unprovided("a reduction of this type");
  }
  if (outcome == Outcome::mismatch) simulated_cuda_report(("collectives do not match: " + why).c_str());
  if (outcome == Outcome::aborted || why.empty()) return;
  {
    std::lock_guard<std::mutex> lock(reason_mutex);
    newest_reason = why;
  }
  error_ = outcome == Outcome::lost ? ncclRemoteError : ncclInternalError;
  // The kernel goes on waiting for what will not come, until somebody who has seen the error aborts.
  if (outcome == Outcome::lost) payload_.wait_for_abort();
}

std::shared_ptr<Communicator> Communicator::split(int color, int key) {
  const std::vector<int64_t> all = talk_.exchange({color, key});
  ++splits_;
  if (color < 0) return nullptr;
  std::vector<std::tuple<int64_t, int>> members;  // key, rank
  for (int r = 0; r < ranks; ++r)
    if (all[2 * static_cast<size_t>(r)] == color) members.emplace_back(all[2 * static_cast<size_t>(r) + 1], r);
  std::sort(members.begin(), members.end());
  int place = 0;
  while (std::get<1>(members[static_cast<size_t>(place)]) != rank) ++place;
  return std::make_shared<Communicator>(name_ + "." + std::to_string(splits_) + "." + std::to_string(color), place,
                                        static_cast<int>(members.size()));
}

void Communicator::abort() {
  payload_.abort();
  talk_.abort();
}

std::string last_reason() {
  std::lock_guard<std::mutex> lock(reason_mutex);
  return newest_reason;
}

ncclUniqueId new_id() {
  ncclUniqueId id{};
  std::random_device random;
  std::snprintf(id.internal, sizeof id.internal, "%08x%08x", random(), random());
  return id;
}

std::string text_of(const ncclUniqueId& id) { return {id.internal, ::strnlen(id.internal, 40)}; }

}  // namespace simulated_nccl
