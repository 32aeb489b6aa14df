#include "group/registry.h"

#include <algorithm>
#include <condition_variable>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <thread>

#include "base/fork_generation.h"
#include "base/of_this_process.h"
#include "base/start_thread.h"
#include "base/thread_name.h"

namespace weightload::group_registry {
namespace {

// What closing a load may wait for others to hear of it; below the second within which Ctrl-C is to be felt.
constexpr std::chrono::milliseconds kGoodbye{400};
constexpr std::chrono::milliseconds kLook{50};  // how soon a farewell notices that it is to stop

struct Farewell {
  std::shared_ptr<GroupExchange> exchange;
  const void* left = nullptr;  // the exchange, which is let go of without the mutex
  const void* group = nullptr;
  bool done = false;
  std::thread thread;  // none where the system had none to give: who next needs the group says it
};

struct Registry {
  std::mutex mutex;                 // guards all below
  std::condition_variable changed;  // a farewell is done
  std::map<const void*, std::weak_ptr<GroupExchange>> active;
  std::list<Farewell> farewells;
  bool stopping = false;
  const uint32_t generation = fork_generation();
};

// The interpreter's exit stops its threads.
Registry& registry() { return of_this_process<Registry>(); }

// Joins those that are done. With the mutex held.
void reap(Registry& all) {
  for (auto it = all.farewells.begin(); it != all.farewells.end();) {
    if (!it->done) {
      ++it;
      continue;
    }
    if (it->thread.joinable()) it->thread.join();  // it has let go of the mutex for the last time
    it = all.farewells.erase(it);
  }
}

void say_farewell(Registry& all, Farewell& mine) {
  name_this_thread();
  while (true) {
    {
      std::lock_guard<std::mutex> lock(all.mutex);
      if (all.stopping) break;
    }
    if (mine.exchange->leave(kLook)) break;
  }
  mine.exchange.reset();
  // Notified with the mutex held: nothing of this thread's is touched after it.
  std::lock_guard<std::mutex> lock(all.mutex);
  mine.done = true;
  all.changed.notify_all();
}

}  // namespace

void claim(const void* group, const std::shared_ptr<GroupExchange>& exchange) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  reap(all);
  for (auto it = all.active.begin(); it != all.active.end();)
    it = it->second.expired() ? all.active.erase(it) : std::next(it);
  std::weak_ptr<GroupExchange>& active = all.active[group];
  const auto before = active.lock();
  if (before && !before->ended())
    throw Error(
        ErrorKind::usage,
        "another load is going on in this group; finish or close it first, or give this one a group of its own");
  active = exchange;
}

void leave(const std::shared_ptr<GroupExchange>& exchange) noexcept {
  Registry& all = registry();
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    const auto is_it = [&](const Farewell& one) { return one.left == exchange.get() && !one.done; };
    if (std::any_of(all.farewells.begin(), all.farewells.end(), is_it)) return;  // its other holder has left
  }
  if (exchange->leave(kGoodbye)) return;
  try {
    std::lock_guard<std::mutex> lock(all.mutex);
    reap(all);
    const auto group = std::find_if(all.active.begin(), all.active.end(),
                                    [&](const auto& one) { return one.second.lock() == exchange; });
    Farewell& farewell = all.farewells.emplace_back();
    farewell.exchange = exchange;
    farewell.left = exchange.get();
    farewell.group = group == all.active.end() ? nullptr : group->first;
    farewell.thread = start_thread([&all, &farewell] { say_farewell(all, farewell); });
  } catch (const std::exception&) {
    // No memory to be had: the others run into the group's timeout.
  }
}

bool settled(const void* group, std::chrono::milliseconds patience) {
  Registry& all = registry();
  std::unique_lock<std::mutex> lock(all.mutex);
  for (Farewell& one : all.farewells) {
    if (one.group == group && !one.thread.joinable() && !one.done) one.done = one.exchange->leave(patience);
  }
  const bool none = all.changed.wait_for(lock, patience, [&] {
    return std::none_of(all.farewells.begin(), all.farewells.end(),
                        [&](const Farewell& one) { return one.group == group && !one.done; });
  });
  reap(all);
  return none;
}

void abandon() noexcept {
  Registry& all = registry();
  std::list<Farewell> left;
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    all.stopping = true;
    left.splice(left.begin(), all.farewells);
  }
  for (Farewell& one : left) {
    if (one.thread.joinable()) {
      one.thread.join();
    } else if (!one.done) {
      one.exchange->leave(kGoodbye);
    }
  }
  std::lock_guard<std::mutex> lock(all.mutex);
  all.stopping = false;
}

}  // namespace weightload::group_registry
