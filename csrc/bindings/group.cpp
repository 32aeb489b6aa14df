#include "bindings/group.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/delete_unless_forked.h"
#include "base/fork_generation.h"
#include "bindings/device_target.h"
#include "bindings/gil.h"
#include "bindings/py_loader.h"
#include "bindings/register.h"
#include "bindings/signals.h"
#include "group/process_group.h"
#include "group/registry.h"

namespace py = pybind11;

namespace weightload {

namespace {

// Calls `step`, which waits a little, without the GIL until it is true; signal handlers run in between.
template <typename Step>
void wait_for(Step&& step) {
  while (true) {
    {
      const ReleaseGil release;
      if (step()) return;
    }
    check_signals();
  }
}

// `turn`, if not null, is taken for it.
void leave(std::shared_ptr<GroupExchange> exchange, uint32_t generation, std::mutex* turn) {
  if (!exchange || generation != fork_generation()) return;
  const ReleaseGil release(AtExit::go_on);
  std::unique_lock<std::mutex> lock;
  if (turn) lock = std::unique_lock<std::mutex>(*turn);
  group_registry::leave(exchange);
  exchange.reset();
}

std::unique_ptr<PyGroup> join(const py::object& python_group, std::optional<const DeviceTarget*> target,
                              const std::string& device, Strategy strategy, std::string load) {
  auto* const group = py::cast<c10d::ProcessGroup*>(python_group);
  // An earlier load may still owe the others something.
  wait_for([&] { return group_registry::settled(group, kSignalInterval); });
  auto collective = make_collective(c10::intrusive_ptr<c10d::ProcessGroup>::reclaim_copy(group), c10::Device(device),
                                    target ? (*target)->device : nullptr);
  const std::shared_ptr<GroupExchange> exchange(new GroupExchange(std::move(collective), strategy, std::move(load)),
                                                DeleteUnlessForked{});
  group_registry::claim(group, exchange);
  return std::make_unique<PyGroup>(exchange);
}

}  // namespace

std::vector<py::bytes> PyGroup::agree(const py::bytes& bytes, bool more, std::optional<size_t> compared,
                                      const py::bytes& parting, bool verdict) {
  if (!exchange_) throw py::value_error("this group's part of the load is over");
  const std::string record = bytes;
  const GroupExchange::Terms terms{compared.value_or(SIZE_MAX), parting, verdict};
  Records records;
  wait_for([&] { return exchange_->agree(record, more, terms, kSignalInterval, records); });
  return {records.begin(), records.end()};
}

void PyGroup::tell(const py::bytes& bytes) {
  const std::string record = bytes;
  Records records;
  {
    const ReleaseGil release;
    if (exchange_) exchange_->agree(record, false, {}, std::chrono::milliseconds(0), records);
  }
  close();
}

void PyGroup::close() { leave(std::move(exchange_), generation_, nullptr); }

void PyVerdict::conclude(const std::string& kind, const py::bytes& message, const py::bytes& path) {
  const auto exchange = exchange_;
  if (!exchange) throw Error(ErrorKind::usage, "the load has been left");
  if (generation_ != fork_generation())
    throw Error(ErrorKind::usage, "this load was begun before fork(); its communicator is the parent's");
  std::optional<Error> failure;
  if (!kind.empty()) {
    const ErrorKind known = kind == "checksum" ? ErrorKind::checksum
                            : kind == "read"   ? ErrorKind::read
                                               : ErrorKind::usage;
    failure.emplace(known, message, ErrorContext{path, {}, {}, 0});
  }
  wait_for([&] {
    const std::lock_guard<std::mutex> lock(mutex_);
    return exchange->conclude(failure, kSignalInterval);
  });
}

void PyVerdict::close() { leave(std::move(exchange_), generation_, &mutex_); }

void register_group(py::module_& module) {
  py::enum_<Strategy> strategy(module, "Strategy");
  strategy.value("independent", Strategy::independent)
      .value("broadcast", Strategy::broadcast)
      .value("striped", Strategy::striped);
  copy_by_number(strategy);

  py::class_<PyVerdict> verdict(module, "Verdict",
                                "The ranks' last meeting of a load: what each of them found out by itself, all hear.");
  verdict
      .def("conclude", &PyVerdict::conclude, py::arg("kind"), py::arg("message"), py::arg("path"),
           "Says how it went here (`kind`: empty for well, checksum, read or another), and raises the error of the "
           "lowest rank that has failed.")
      .def("close", &PyVerdict::close, "Leaves: the other ranks hear it.");
  refuse_copies(verdict);

  py::class_<PyGroup> made(
      module, "Group", "One load's share of a torch.distributed.ProcessGroup. A loader takes it over; close() leaves.");
  made.def(py::init(&join), py::arg("group"), py::arg("target"), py::arg("device"), py::arg("strategy"),
           py::arg("load"))
      .def("agree", &PyGroup::agree, py::arg("record"), py::arg("more"), py::arg("compared") = py::none(),
           py::arg("parting") = py::bytes(), py::arg("verdict") = false,
           "The records of all ranks, which must have the same size. The first byte of those that agree is 1. They "
           "agree "
           "if `compared` bytes (all by default) are equal. With `parting`, all must be; where only those are, the "
           "ranks "
           "meet once more, and a rank that was interrupted gives them that. `verdict`: whether the ranks that have "
           "agreed meet behind the load.")
      .def(
          "verdict", [](const PyGroup& group) { return std::make_unique<PyVerdict>(group.shared()); },
          "That meeting, for when the load is over: who has it closes it.")
      .def(
          "let_go", [](PyGroup& group) { group.take(); },
          "The load has no more to say, but in the verdict: it is over for this.")
      .def("tell", &PyGroup::tell, py::arg("record"), "agree(record), without waiting for the others, then close().")
      .def("close", &PyGroup::close);
  refuse_copies(made);
}

}  // namespace weightload
