"""State that a caller of torch may have set while it loads, and how to tell that a load neither met nor moved it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[], Any]


class Seeing(TorchFunctionMode):
    """A mode that writes down what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class SeeingDispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Refusing(TorchFunctionMode):
    """A mode in which torch cannot be used."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ZeroDivisionError(f"{function} was called")


class RefusingDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ZeroDivisionError(f"{function} was called")


@contextlib.contextmanager
def restored(setter: Callable[..., Any], value: Any, before: Any) -> Iterator[None]:
    """A setting of the process, or the thread."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setter(value)
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            setter(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextlib.contextmanager
def constructors_on_meta() -> Iterator[None]:
    """Patch torch like accelerate's init_empty_weights, DeepSpeed's zero.Init and transformers' no_init_weights."""
    register = torch.nn.Module.register_parameter
    makers = {name: getattr(torch, name) for name in ("empty", "zeros", "ones", "full", "arange", "tensor", "randn")}
    starters = {name: getattr(torch.nn.init, name) for name in ("kaiming_uniform_", "normal_", "uniform_", "zeros_")}

    def elsewhere(maker: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: maker(*args, **{**kwargs, "device": "meta"})

    def register_on_meta(module: Any, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"))

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[assignment]
    for name, maker in makers.items():
        setattr(torch, name, elsewhere(maker))
    for name in starters:
        setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
        for name, function in makers.items():
            setattr(torch, name, function)
        for name, function in starters.items():
            setattr(torch.nn.init, name, function)


def refuse(tensor: Any) -> Any:
    raise ZeroDivisionError("a tensor was saved for backward")


@contextlib.contextmanager
def all_at_once() -> Iterator[None]:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"), Seeing():
        with SeeingDispatch(), FakeTensorMode(), restored(torch.set_default_dtype, torch.float16, torch.float32):
            yield


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "FakeTensorMode": FakeTensorMode,
    "FakeTensorMode among real ones": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "device meta": lambda: torch.device("meta"),
    "device cpu": lambda: torch.device("cpu"),
    "devices, one in the other": lambda: nested(torch.device("meta"), torch.device("cpu"), torch.device("meta")),
    "default device": lambda: restored(torch.set_default_device, "meta", None),
    "default dtype bf16": lambda: restored(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default dtype f16": lambda: restored(torch.set_default_dtype, torch.float16, torch.float32),
    "default dtype f64": lambda: restored(torch.set_default_dtype, torch.float64, torch.float32),
    "default tensor type": lambda: restored(torch.set_default_tensor_type, torch.DoubleTensor, torch.FloatTensor),
    "inference mode": torch.inference_mode,
    "out of inference mode": lambda: nested(torch.inference_mode(), torch.inference_mode(False)),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "function mode": Seeing,
    "function mode that refuses": Refusing,
    "dispatch mode": SeeingDispatch,
    "dispatch mode that refuses": RefusingDispatch,
    "base function mode": BaseTorchFunctionMode,
    "no function modes": torch._C.DisableTorchFunction,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "hooks of saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
    "invariants of sparse tensors": lambda: torch.sparse.check_sparse_tensor_invariants(True),
    "every warning": lambda: restored(torch.set_warn_always, True, False),
    "forward derivatives": torch.autograd.forward_ad.dual_level,
    "constructors on meta": constructors_on_meta,
    "all at once": all_at_once,
}


@contextlib.contextmanager
def nested(*contexts: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def in_context(make: Callable[[], contextlib.AbstractContextManager[Any]]) -> Callable[[Call], Any]:
    def run(call: Call) -> Any:
        with make():
            return call()

    return run


def in_transform(transform: Callable[[Callable[[torch.Tensor], torch.Tensor]], Any]) -> Callable[[Call], Any]:
    def run(call: Call) -> Any:
        results = []

        def within(x: torch.Tensor) -> torch.Tensor:
            results.append(call())
            return (x * 2).sum()

        transform(within)
        return results[-1]

    return run


def traced(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(function, torch.ones(3), check_trace=False)


# Each runs a call with something set, and gives what it gave.
MODES: dict[str, Callable[[Call], Any]] = {
    **{name: in_context(make) for name, make in CONTEXTS.items()},
    "vmap": in_transform(lambda f: torch.vmap(f)(torch.ones(2, 3))),
    "grad": in_transform(lambda f: torch.func.grad(f)(torch.ones(3))),
    "grad of vmap": in_transform(lambda f: torch.func.grad(lambda x: torch.vmap(f)(x).sum())(torch.ones(2, 3))),
    "jvp": in_transform(lambda f: torch.func.jvp(f, (torch.ones(3),), (torch.ones(3),))),
    "functionalize": in_transform(lambda f: torch.func.functionalize(f)(torch.ones(3))),
    "jit.trace": in_transform(traced),
    "compiler.disable": in_transform(lambda f: torch.compiler.disable(f)(torch.ones(3))),
}

LEAF = torch.ones(3, requires_grad=True)


def look_around() -> list[Any]:
    """Return what the user's own calls of torch do here."""

    def outcome(call: Call) -> Any:
        try:
            got = call()
        except Exception as error:
            return type(error)
        if not isinstance(got, torch.Tensor):
            return got
        with torch._C.DisableTorchFunction():
            return type(got), got.dtype, got.device, got.requires_grad, got.is_inference()

    writing = [mode.seen for mode in modes_here() if isinstance(mode, (Seeing, SeeingDispatch))]
    lengths = [len(seen) for seen in writing]
    here: list[Any] = [
        outcome(lambda: torch.zeros(2)),
        torch.jit.is_tracing() or outcome(lambda: LEAF * 2),  # of which a trace takes no constants that have a gradient
        outcome(lambda: torch.ones(2, 2) @ torch.ones(2, 2)),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.jit.is_tracing(),
        torch._C._functorch.maybe_current_level() if hasattr(torch._C._functorch, "maybe_current_level") else None,
        [type(mode) for mode in modes_here()],
        str(torch._C._dispatch_tls_local_include_set()),
        str(torch._C._dispatch_tls_local_exclude_set()),
    ]
    for seen, length in zip(writing, lengths, strict=True):
        here.append(seen[length:])
        del seen[length:]
    return here


def modes_here() -> list[Any]:
    functions = [torch._C._get_function_stack_at(at) for at in range(torch._C._len_torch_function_stack())]
    operators = [torch._C._get_dispatch_stack_at(at) for at in range(torch._C._len_torch_dispatch_stack())]
    return [*functions, *operators]


def undisturbed(call: Call) -> Any:
    """A call's outcome; nothing of what is set here has seen it, or is another afterwards."""
    before = look_around()
    try:
        return call()
    finally:
        assert [mode.seen for mode in modes_here() if getattr(mode, "seen", None)] == []
        assert look_around() == before


def described(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that can be asked of a tensor, its bytes included. Outside of any mode."""
    host = tensor.detach().cpu()
    whole = host.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if host.numel() else b""
    return (
        type(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.layout, tensor.requires_grad,
        tensor.is_inference(), tensor.is_leaf, tensor.grad_fn, tensor._version, tensor.storage_offset(),
        tensor.untyped_storage().nbytes(), str(torch._C._dispatch_keys(tensor)), whole,
    )  # fmt: skip
