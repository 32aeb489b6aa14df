#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <iterator>
#include <utility>
#include <vector>

#include "bindings/register.h"

namespace py = pybind11;

namespace weightload {
namespace {

using Values = py::typing::Dict<py::str, py::object>;

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
        take_back();
      } catch (py::error_already_set& no_memory) {
        no_memory.discard_as_unraisable("settings");
      }
    }
  }

  void enter() {
    const py::tuple outer = blocks();
    py::tuple blocks(outer.size() + 1);
    for (size_t i = 0; i < outer.size(); ++i) blocks[i] = outer[i];
    const auto block = py::reinterpret_steal<py::dict>(PyDict_Copy(values_.ptr()));
    if (!block) throw py::error_already_set();
    blocks[outer.size()] = block;
    open_.reserve(open_.size() + 1);
    open_.push_back({block, set(blocks)});
  }

  void exit(const py::args& /*what was raised*/) {
    if (open_.empty()) throw std::runtime_error("the block that ends was never begun");
    take_back();
  }

 private:
  struct Block {
    py::dict values;
    py::object token;  // of the context in which it was begun
  };

  py::tuple blocks() const {
    PyObject* now = nullptr;
    if (PyContextVar_Get(variable_.ptr(), nullptr, &now) < 0) throw py::error_already_set();
    return now ? py::reinterpret_steal<py::tuple>(now) : py::tuple();
  }

  py::object set(const py::tuple& blocks) const {
    PyObject* const token = PyContextVar_Set(variable_.ptr(), blocks.ptr());
    if (!token) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(token);
  }

  // The innermost block of this context: threads and tasks may use the same object. Where it has none, a generator is
  // let go of in another context than it was begun in; that one's variable cannot be reached, so its block is emptied.
  void take_back() {
    for (auto block = open_.rbegin(); block != open_.rend(); ++block) {
      const py::tuple now = blocks();
      const py::tuple others = without(now, block->values);
      if (PyContextVar_Reset(variable_.ptr(), block->token.ptr()) == 0) {  // begun here
        open_.erase(std::next(block).base());
        set(others);
        return;
      }
      PyErr_Clear();
    }
    py::dict values = open_.back().values;
    open_.pop_back();
    values.clear();
  }

  static py::tuple without(const py::tuple& blocks, const py::dict& block) {
    py::list others;
    for (const py::handle& other : blocks) {
      if (!other.is(block)) others.append(other);
    }
    return py::tuple(others);
  }

  py::object variable_;
  Values values_;
  std::vector<Block> open_;  // in any context; the innermost last
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
