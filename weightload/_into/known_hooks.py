"""torch's own hooks of modules that do no more than rename: of activation checkpointing and offloading, of weight norm.

They are known by where they are defined. Whatever else is registered is the user's, and called.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

Module = torch.nn.Module

WRAPPED = "_checkpoint_wrapped_module"
"""The attribute in which ``checkpoint_wrapper`` and ``offload_wrapper`` have the module that they wrap."""
_WRAPPER = ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper.")
_WEIGHT_NORM = ("torch.nn.utils.parametrizations", "weight_norm.<locals>._weight_norm_compat_hook")


def wrapped(part: Module) -> Module | None:
    """The module in a wrapper of which ``state_dict`` and ``load_state_dict`` see no trace in names; else None.

    The wrapper may have other hooks, or a way of its own to load.
    """
    if WRAPPED not in part._modules or len(part._modules) > 1 or part._parameters or part._buffers:
        return None
    if type(part).set_extra_state is not Module.set_extra_state:
        return None
    hooks = vars(part).get("_load_state_dict_pre_hooks") or {}
    return part._modules[WRAPPED] if sum(map(adds_prefix, hooks.values())) == 1 else None


def adds_prefix(hook: object) -> bool:
    """Whether a hook before loading is the wrapper's own, which puts ``WRAPPED`` into the names."""
    return _is(hook, _WRAPPER[0], _WRAPPER[1] + "_pre_load_state_dict_hook")


def takes_prefix(hook: object) -> bool:
    """Whether a hook of the state_dict is the wrapper's own, which takes it out again."""
    return _is(hook, _WRAPPER[0], _WRAPPER[1] + "_post_state_dict_hook")


def is_idle(hook: object, prefix: str, names: Collection[str]) -> bool:
    """Whether a hook before loading is weight norm's own, and has no old names to change: all that it does."""
    if not _is(hook, *_WEIGHT_NORM):
        return False
    function: Any = _plain(hook)
    held = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if list(held) != ["name"]:
        return False
    name = held["name"].cell_contents
    return not (f"{prefix}{name}_g" in names and f"{prefix}{name}_v" in names)


def in_state_dict(root: Module, name: str) -> str:
    """The name in ``state_dict`` of a name in ``load_state_dict``: without the parts that wrappers put into it."""
    begin = ""
    part: Module | None = root
    while part is not None:
        inner = wrapped(part)
        head, dot, rest = name.partition(".")
        if not dot or head not in part._modules:
            break
        if inner is None:
            begin = f"{begin}{head}."
        part, name = part._modules[head], rest
    return begin + name


def _is(hook: object, where: str, name: str) -> bool:
    function = _plain(hook)
    return getattr(function, "__module__", None) == where and getattr(function, "__qualname__", None) == name


def _plain(hook: object) -> object:
    return getattr(hook, "hook", hook)
