#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/fork_generation.h"
#include "group/exchange.h"

namespace weightload {

// One load's share of a group, until a loader takes it over.
class PyGroup {
 public:
  explicit PyGroup(std::shared_ptr<GroupExchange> exchange) : exchange_(std::move(exchange)) {}
  ~PyGroup() { close(); }

  // The records of all ranks. Waits without the GIL, and lets signal handlers run.
  std::vector<pybind11::bytes> agree(const pybind11::bytes& record, bool more, std::optional<size_t> compared,
                                     const pybind11::bytes& parting, bool verdict);

  // agree(), for a rank that fails and does not wait for the others.
  void tell(const pybind11::bytes& record);

  // Leaves the load.
  void close();

  std::shared_ptr<GroupExchange> take() { return std::move(exchange_); }
  std::shared_ptr<GroupExchange> shared() const { return exchange_; }

 private:
  std::shared_ptr<GroupExchange> exchange_;
  const uint32_t generation_ = fork_generation();
};

// What is left of a load's share of a group when all its tensors are there: see Note [Verdict] in group/exchange.h. It
// is closed when the loader is, and behind it.
class PyVerdict {
 public:
  explicit PyVerdict(std::shared_ptr<GroupExchange> exchange) : exchange_(std::move(exchange)) {}
  ~PyVerdict() { close(); }

  // Waits as PyGroup::agree() does; another thread may close it meanwhile. `kind`: of this rank's failure, by the name
  // that it has for Python; empty if all is well.
  void conclude(const std::string& kind, const pybind11::bytes& message, const pybind11::bytes& path);

  // Leaves, unless the verdict is known.
  void close();

 private:
  std::shared_ptr<GroupExchange> exchange_;  // guarded by the GIL
  std::mutex mutex_;                         // whose turn it is to use it; taken without the GIL
  const uint32_t generation_ = fork_generation();
};

// What `group` has, which gives it up; null for null.
inline std::shared_ptr<GroupExchange> exchange_of(PyGroup* group) { return group ? group->take() : nullptr; }

}  // namespace weightload
