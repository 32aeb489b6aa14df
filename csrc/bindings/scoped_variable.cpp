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

// Not in Python: a signal's handler may raise between the change of a variable and the `try` that would take it back.
// Nothing can come between enter(), the block and exit(): up to 3.13 Python does not look at signals after what a
// `with` statement calls by itself. Where it does the object goes, and takes the change back.
class ScopedVariable {
 public:
  ScopedVariable(py::object variable, Values values) : variable_(std::move(variable)), values_(std::move(values)) {}

  ~ScopedVariable() {
    const py::error_scope outer;  // an exception is on its way
    for (size_t open = tokens_.size(); open > 0; --open) take_back();
  }

  void enter() {
    PyObject* now = nullptr;
    if (PyContextVar_Get(variable_.ptr(), nullptr, &now) < 0) throw py::error_already_set();
    const auto outer = py::reinterpret_steal<py::object>(now);
    py::dict merged;
    for (const py::object& part : {outer, py::object(values_)}) {
      if (part && PyDict_Update(merged.ptr(), part.ptr()) < 0) throw py::error_already_set();
    }
    tokens_.reserve(tokens_.size() + 1);
    PyObject* const token = PyContextVar_Set(variable_.ptr(), merged.ptr());
    if (!token) throw py::error_already_set();
    tokens_.push_back(py::reinterpret_steal<py::object>(token));
  }

  void exit(const py::args& /*what was raised*/) {
    if (tokens_.empty()) throw std::runtime_error("the block that ends was never begun");
    take_back();
  }

 private:
  // The innermost block of this context. Python refuses the tokens of others: of threads that use this object too, of a
  // generator that is let go of elsewhere, where there is nothing to take back.
  void take_back() {
    for (auto token = tokens_.rbegin(); token != tokens_.rend(); ++token) {
      if (PyContextVar_Reset(variable_.ptr(), token->ptr()) == 0) {
        tokens_.erase(std::next(token).base());
        return;
      }
      PyErr_Clear();
    }
  }

  py::object variable_;
  Values values_;
  std::vector<py::object> tokens_;  // of the blocks that are open, in any context; the innermost last
};

}  // namespace

void register_scoped_variable(py::module_& module) {
  py::class_<ScopedVariable> scoped(module, "ScopedVariable",
                                    "A context manager that adds values to the dictionary of a context variable.");
  scoped.def(py::init<py::object, Values>(), py::arg("variable"), py::arg("values"))
      .def("__enter__", &ScopedVariable::enter)
      .def("__exit__", &ScopedVariable::exit);
  refuse_copies(scoped);
}

}  // namespace weightload
