"""torch without what its caller has set: modes, contexts, transforms, and constructors that somebody replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch

from weightload import _C

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def plainly(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function run with torch as it is in a new thread, whatever its caller has set (``with`` a mode, say).

    For every function of this package that asks torch anything: a ``TorchFunctionMode`` even sees ``tensor.dtype``. Not
    for one that runs code of the user (a predicate, a hook of a module) or that is a generator.
    """

    @functools.wraps(function)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        result: Result = _C.plainly(function, arguments, options)
        return result

    return run


@plainly
def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.empty``, which contexts of other libraries replace to get tensors on the meta device."""
    # Deterministic algorithms fill it, for which torch has no kernel for packed dtypes.
    held = torch.uint8 if dtype.itemsize == 1 else dtype
    return torch.as_tensor(0, device="cpu").new_empty(tuple(shape), dtype=held, device=device).view(dtype)


@plainly
def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``torch.zeros``, which contexts of other libraries replace, too; also of packed dtypes."""
    held = torch.uint8 if dtype.itemsize == 1 else dtype
    return torch.as_tensor(0, device="cpu").new_zeros(tuple(shape), dtype=held, device=device).view(dtype)
