"""Stand-ins for safetensors' functions in a framework. Calls that they do not serve go to the originals."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch

import weightload._api.files as files
import weightload._into.load_model as into
from weightload._api.safe_open import TORCH_NAMES
from weightload._base.handlers import pass_on
from weightload._install.read_ahead import SafeOpen
from weightload._load import devices
from weightload.errors import WeightLoadError

BACKENDS = ("mmap", "pread")
safetensors_open = safetensors.safe_open
safetensors_load_file, safetensors_load_model = safetensors.torch.load_file, safetensors.torch.load_model
_private: contextvars.ContextVar[bool] = contextvars.ContextVar("weightload_private_memory", default=False)


@contextlib.contextmanager
def private_memory() -> Iterator[None]:
    """Have what is loaded meanwhile, in this thread, be no views of a mapped file."""
    token = _private.set(True)
    try:
        yield
    finally:
        _private.reset(token)


def pairs() -> Iterable[tuple[object, object]]:
    """The functions of safetensors and their stand-ins; modules, too, by whose names frameworks call its functions."""
    functions = [
        (safetensors.safe_open, safe_open),
        (safetensors.torch.load_file, load_file),
        (safetensors.torch.load_model, load_model),
    ]
    stand_in = {id(before): after for before, after in functions}
    torch_module = _module_like(safetensors.torch, stand_in)
    whole = _module_like(safetensors, stand_in | {id(safetensors.torch): torch_module})
    return [*functions, (safetensors.torch, torch_module), (safetensors, whole)]


def served(filename: object, device: object, options: dict[str, Any]) -> dict[str, Any] | None:
    """The options to load with, or None where safetensors is to do it, or to say what is wrong."""
    if not isinstance(filename, (str, os.PathLike)) or set(options) - {"backend"}:
        return None
    backend = options.get("backend", "mmap")
    if backend not in BACKENDS or not isinstance(device, (str, int, torch.device)):
        return None
    target = usable(device)
    return None if target is None else {"device": target, "backend": "pread" if _private.get() else backend}


def usable(device: torch.device | str | int) -> torch.device | None:
    """The device, if tensors can be loaded to it here."""
    try:
        return devices.resolve(device)
    except (ValueError, WeightLoadError) as error:
        pass_on(error)
        return None


class safe_open(SafeOpen):
    """``safe_open``; a handle of safetensors' own where that is asked for what is not served here."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        bound = _bound(*arguments, **options)
        if bound is None:
            return safetensors_open(*arguments, **options)
        handle = object.__new__(cls)
        SafeOpen.__init__(handle, **bound)
        return handle

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """``__new__`` has done it."""


def _bound(*arguments: Any, **options: Any) -> dict[str, Any] | None:
    """Arguments of ``safe_open`` by their names, as they are served; None where they are not."""
    named = dict(zip(("filename", "framework", "device"), arguments, strict=False))
    if len(arguments) > 3 or named.keys() & options.keys():
        return None
    named |= options
    filename, framework = named.pop("filename", None), named.pop("framework", None)
    if framework not in TORCH_NAMES:
        return None
    device = named.pop("device", "cpu")
    how = served(filename, "cpu" if device is None else device, named)
    return None if how is None else {"filename": filename, **how}


@functools.wraps(safetensors.torch.load_file)
def load_file(filename: Any, device: Any = "cpu", **options: Any) -> Any:
    how = served(filename, device, options)
    if how is None:
        return safetensors_load_file(filename, device=device, **options)
    return files.load_file(filename, **how)


@functools.wraps(safetensors.torch.load_model)
def load_model(model: Any, filename: Any, strict: bool = True, device: Any = "cpu", **options: Any) -> Any:
    how = served(filename, device, options)
    if how is None:
        return safetensors_load_model(model, filename, strict=strict, device=device, **options)
    return into.load_model(model, filename, strict, **how)


# Pickled by where they are.
load_file.__module__ = load_model.__module__ = __name__


def _module_like(original: ModuleType, others: dict[int, Any]) -> ModuleType:
    """A module that has everything of another, but for what is replaced."""
    module = _Like(original.__name__, original.__doc__)
    own: dict[str, Any] = {"original": original, "others": others}
    for name, value in own.items():
        object.__setattr__(module, name, value)
    return module


class _Like(ModuleType):
    original: ModuleType
    others: dict[int, Any]

    def __getattribute__(self, name: str) -> Any:
        if name in ("original", "others"):
            return super().__getattribute__(name)
        value = getattr(self.original, name)
        return self.others.get(id(value), value)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.original, name, value)

    def __dir__(self) -> list[str]:
        return dir(self.original)
