#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "bindings/register.h"

namespace py = pybind11;

namespace weightload {
namespace {

using Values = py::typing::Dict<py::str, py::object>;

// Up to 3.11 Python's garbage collector runs within allocations, and finalisers in it, which may begin and end blocks,
// of the same object too, while the variable is being changed.
class NoCollection {
 public:
  NoCollection() : was_enabled_(PyGC_Disable() != 0) {}
  ~NoCollection() {
    if (was_enabled_) PyGC_Enable();
  }
  NoCollection(const NoCollection&) = delete;
  NoCollection& operator=(const NoCollection&) = delete;

 private:
  bool was_enabled_;
};

// The variable's value is a tuple of dictionaries, one of each block that is open, the innermost last. A block is known
// by its own dictionary, so blocks may end in any order, as those of generators do that are let go of in another's
// block.
//
// Not in Python: a signal's handler may raise between the change of a variable and the `try` that would take it back.
// Nothing can come between enter(), the block and exit(): up to 3.13 Python does not look at signals after what a
// `with` statement calls by itself. Where it does the object goes, and takes the change back.
class ScopedVariable {
 public:
  ScopedVariable(py::object variable, Values values) : variable_(std::move(variable)), values_(std::move(values)) {}

  ~ScopedVariable() {
    const py::error_scope outer;  // an exception is on its way
    while (!open_.empty()) {
      try {
        take_back(open_.end() - 1);
      } catch (py::error_already_set& no_memory) {
        no_memory.discard_as_unraisable("settings");
      }
    }
  }

  void enter() {
    const NoCollection guard;
    const auto block = py::reinterpret_steal<py::dict>(PyDict_Copy(values_.ptr()));
    if (!block) throw py::error_already_set();
    open_.reserve(open_.size() + 1);
    py::object token = set(with(block));
    open_.push_back({block, std::move(token), PyEval_GetFrame()});
  }

  void exit(const py::args& /*what was raised*/) {
    const NoCollection guard;  // asking for the frame allocates
    if (open_.empty()) throw std::runtime_error("the block that ends was never begun");
    take_back(find_ended());
  }

 private:
  struct Block {
    py::object values;
    py::object token;   // of the context in which it was begun
    const void* frame;  // that began it; to compare with
  };
  using Blocks = std::vector<Block>;

  // Threads, tasks and generators may use one object at the same time. A `with` statement ends in the frame that it
  // began in; frames that are over may have had the same address, so of several the one in force here. What else calls
  // (ExitStack, say) ends the innermost block that is in force here, if any is.
  Blocks::iterator find_ended() {
    const void* const frame = PyEval_GetFrame();
    const py::tuple here = blocks_here();
    const auto rank_of = [&](const Block& block) {
      const bool is_here = std::any_of(here.begin(), here.end(), [&](py::handle one) { return one.is(block.values); });
      return (block.frame == frame ? 2 : 0) + (is_here ? 1 : 0);
    };
    auto found = open_.end() - 1;
    for (auto block = found; block != open_.begin();) {
      if (rank_of(*--block) > rank_of(*found)) found = block;
    }
    return found;
  }

  // Of a block that was begun in another context the variable cannot be reached, as where a generator is let go of
  // elsewhere: it stays, without values, until a block is begun there.
  void take_back(Blocks::iterator block) {
    const NoCollection guard;
    const Block ended = std::move(*block);  // goes last: its context may go with it, and what that holds, by finalisers
    open_.erase(block);
    const py::tuple others = with({}, ended.values);
    if (PyContextVar_Reset(variable_.ptr(), ended.token.ptr()) == 0) {
      set(others);
    } else {
      PyErr_Clear();
      PyDict_Clear(ended.values.ptr());
    }
  }

  py::tuple blocks_here() const {
    PyObject* now = nullptr;
    if (PyContextVar_Get(variable_.ptr(), nullptr, &now) < 0) throw py::error_already_set();
    return now ? py::reinterpret_steal<py::tuple>(now) : py::tuple();
  }

  // The variable's value with another block, and without those that have ended.
  py::tuple with(const py::dict& block, const py::object& ended = {}) const {
    py::list blocks;
    for (const py::handle& other : blocks_here()) {
      if (!other.is(ended) && py::len(other) > 0) blocks.append(other);
    }
    if (py::len(block) > 0) blocks.append(block);
    return py::tuple(blocks);
  }

  py::object set(const py::tuple& blocks) const {
    PyObject* const token = PyContextVar_Set(variable_.ptr(), blocks.ptr());
    if (!token) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(token);
  }

  py::object variable_;
  Values values_;
  Blocks open_;  // in any context; the innermost last
};

}  // namespace

void register_scoped_variable(py::module_& module) {
  py::class_<ScopedVariable> scoped(module, "ScopedVariable",
                                    "A context manager that adds a dictionary to the tuple of a context variable.");
  scoped.def(py::init<py::object, Values>(), py::arg("variable"), py::arg("values"))
      .def("__enter__", &ScopedVariable::enter)
      .def("__exit__", &ScopedVariable::exit);
  refuse_copies(scoped);
}

}  // namespace weightload
