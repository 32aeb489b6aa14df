#include "device/plain_torch.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/ThreadLocalState.h>
#include <c10/core/AutogradState.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/PythonDispatcherTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <utility>

namespace weightload {
namespace {

namespace tracer = torch::jit::tracer;
using DispatchModes = c10::impl::TorchDispatchModeTLS;
using FunctionModes = at::impl::PythonTorchFunctionTLS;
using PythonDispatcher = c10::impl::PythonDispatcherTLS;

// Note [The caller's torch]
// What torch does when it is called depends on its thread: modes of Python (FakeTensorMode, torch.device(...) as a
// context, those that users write) take operators over, transforms of torch.func and torch.jit.trace wrap or record
// them, inference mode makes tensors of another kind, autocast other dtypes. They are about the caller's own
// operators. A loader's tensors are the file's, whatever is active; and a mode of Python that an operator meets without
// the GIL ends the process. Our own threads begin with nothing set; the caller's gets there for as long as a guard
// lives. What is torch's own and process-wide (default dtype, deterministic algorithms) stays: no code of ours leaves a
// dtype or a device to a default. Profilers stay, too.

c10::impl::LocalDispatchKeySet keys_of_a_new_thread() { return c10::impl::PODLocalDispatchKeySet{}; }

bool is_plain() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  const c10::impl::LocalDispatchKeySet plain = keys_of_a_new_thread();
  const c10::AutogradState& autograd = c10::AutogradState::get_tls_state();
  return keys.included_ == plain.included_ && keys.excluded_ == plain.excluded_ && autograd.get_grad_mode() &&
         autograd.get_fw_grad_mode() && !autograd.get_inference_mode() && FunctionModes::stack_len() == 0 &&
         FunctionModes::get_disabled_state() == at::impl::TorchFunctionDisabledState::ENABLED &&
         DispatchModes::stack_len() == 0 && !PythonDispatcher::get_state();
}

}  // namespace

struct PlainTorch::Aside {
  at::ThreadLocalState state;
  std::shared_ptr<tracer::TracingState> trace = tracer::getTracingState();
};

PlainTorch::PlainTorch() {
  if (is_plain()) return;
  aside_ = std::make_unique<Aside>();
  if (aside_->trace) tracer::setTracingState(nullptr);
  c10::AutogradState autograd = c10::AutogradState::get_tls_state();
  autograd.set_grad_mode(true);
  autograd.set_fw_grad_mode(true);
  autograd.set_inference_mode(false);
  c10::AutogradState::set_tls_state(std::move(autograd));
  FunctionModes::set_state({});
  DispatchModes::set_state({});
  PythonDispatcher::reset_state();
  at::functorch::setFuncTorchTLS(nullptr);
  // Last: some of the above have keys of their own.
  c10::impl::_force_tls_local_dispatch_key_set(keys_of_a_new_thread());
}

PlainTorch::~PlainTorch() {
  if (!aside_) return;
  if (aside_->trace) tracer::setTracingState(std::move(aside_->trace));
  at::ThreadLocalState::setThreadLocalState(aside_->state);
}

}  // namespace weightload
