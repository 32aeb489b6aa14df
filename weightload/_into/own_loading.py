"""Modules that take part in their own loading: which they are, and how they get their part as load_state_dict gives it.

``Module.load_state_dict`` calls each module's ``_load_from_state_dict`` with the tensors under its name, from the top
down, and its hooks. Most modules make of that no more than copies to their own tensors, and those are read into
directly. A module that makes more of it gets real tensors, all that are under its name, in ways of torch: what it
does with those of the modules below it is its own affair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.nn.modules import batchnorm, instancenorm, module
from torch.nn.modules.module import _IncompatibleKeys

from weightload._base.handlers import pass_on
from weightload._into.known_hooks import WRAPPED, adds_prefix, in_state_dict, is_idle, takes_prefix, wrapped
from weightload._into.places import PLAIN
from weightload._parts.shards import is_dtensor, is_resharding, may_forgive
from weightload.errors import StateDictError

Module = torch.nn.Module
EXTRA_STATE = "_extra_state"
SAVING = ("state_dict", "_save_to_state_dict")


def _of_torch(function: Any, where: Any) -> bool:
    """Whether a method is torch's own, not one that was put in its place before we looked."""
    return getattr(function, "__globals__", None) is vars(where)


PLAIN_LOADING = tuple(
    function for function, where in ((Module._load_from_state_dict, module),) if _of_torch(function, where)
)
NORM_LOADING = tuple(
    function
    for function, where in (
        (batchnorm._NormBase._load_from_state_dict, batchnorm),
        (instancenorm._InstanceNorm._load_from_state_dict, instancenorm),
    )
    if _of_torch(function, where)
)


def takes_part(part: Module, prefix: str, names: Collection[str]) -> bool:
    """Whether loading this module, of a checkpoint of these names, is more than copying to its own tensors.

    What its children make of it, and hooks that are called after the loading, do not count.
    """
    kind, own = type(part), vars(part)
    loading = kind._load_from_state_dict
    hooks = own.get("_load_state_dict_pre_hooks")
    if "_load_from_state_dict" in own or hooks is None:
        return True
    if hooks and not all(_only_renames(hook, part, prefix, names) for hook in hooks.values()):
        return True
    if loading in NORM_LOADING:
        if _norm_takes_part(part, prefix, names):
            return True
    elif loading not in PLAIN_LOADING:
        return True
    if kind.set_extra_state is not Module.set_extra_state and prefix + EXTRA_STATE in names:
        return True
    if torch.__future__.get_swap_module_params_on_conversion():
        # Such tensors may have a module_load of their own.
        tensors = [*part._parameters.values(), *part._buffers.values()]
        return any(tensor is not None and type(tensor) not in PLAIN and _loads_itself(tensor) for tensor in tensors)
    return False


def _only_renames(hook: object, part: Module, prefix: str, names: Collection[str]) -> bool:
    """Whether a hook before loading is one of torch's own whose work is known, or nothing for these names."""
    if adds_prefix(hook):
        return wrapped(part) is not None
    return is_resharding(hook) or is_idle(hook, prefix, names)


def _loads_itself(tensor: torch.Tensor) -> bool:
    """Whether it may have a ``module_load`` that is no copy: a DTensor's is one, its shards stay where they are."""
    return not is_dtensor(tensor) or type(tensor).module_load is not torch.Tensor.module_load


def _norm_takes_part(part: Any, prefix: str, names: Collection[str]) -> bool:
    """Whether torch's norms do more than keep the ``num_batches_tracked`` that old checkpoints lack."""
    if part.track_running_stats:
        counted = part._buffers.get("num_batches_tracked")
        return counted is None or "num_batches_tracked" in part._non_persistent_buffers_set
    old = isinstance(part, instancenorm._InstanceNorm)
    return old and any(prefix + name in names for name in ("running_mean", "running_var"))


@dataclasses.dataclass
class Walk:
    """A module as ``load_state_dict`` sees it. Names and prefixes are those that ``state_dict`` gives."""

    root: Module | None = None
    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """The tensors that are copied to, in the order of torch."""
    theirs: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Those of modules that take part, and of all below these."""
    parts: dict[str, Module] = dataclasses.field(default_factory=dict)
    """The topmost modules that take part, by prefix."""
    excused: set[str] = dataclasses.field(default_factory=set)
    """Tensors that keep what they hold where the checkpoint lacks them."""
    extra: dict[str, str] = dataclasses.field(default_factory=dict)
    """Names of extra states that the checkpoint lacks, by prefix."""
    makers: list[tuple[str, Module]] = dataclasses.field(default_factory=list)
    """The topmost modules that are copied to, but whose state_dict is not torch's alone, with their prefix."""
    kinds: dict[type[Module], bool] = dataclasses.field(default_factory=dict)
    """Whether a class has a state_dict of its own."""
    forgiving: bool = False
    """Whether some of them may forgive names."""
    hooked: bool = False
    """Whether hooks are called after the loading: they may forgive names."""
    wraps: bool = False
    """Whether there are wrappers that show in names while modules load, and not in those of the state_dict."""

    def into(self, part: Module, prefix: str, names: Collection[str]) -> None:
        """Look at a module and all below it."""
        if takes_part(part, prefix, names):
            self.parts[prefix] = part
            self._theirs(part, prefix)
            return
        self.tensors.update(own_tensors(part, prefix))
        if self._makes(part) and not any(prefix.startswith(above) for above, _ in self.makers):
            self.makers.append((prefix, part))
        if type(part)._load_from_state_dict in NORM_LOADING and part.track_running_stats:
            self.excused.add(prefix + "num_batches_tracked")
        if type(part).set_extra_state is not Module.set_extra_state:
            self.extra[prefix] = prefix + EXTRA_STATE
        for below, child in self._children(part, prefix):
            self.into(child, below, names)
        self._look_at_hooks(part)

    def _children(self, part: Module, prefix: str) -> list[tuple[str, Module]]:
        """With their prefixes; that of a wrapped module is its wrapper's."""
        if (inner := wrapped(part)) is not None:
            self.wraps = True
            return [(prefix, inner)]
        return [(f"{prefix}{name}.", child) for name, child in part._modules.items() if child is not None]

    def _look_at_hooks(self, part: Module) -> None:
        hooks = part._load_state_dict_post_hooks
        self.hooked = self.hooked or bool(hooks)
        self.forgiving = self.forgiving or any(map(may_forgive, hooks.values()))

    def _makes(self, part: Module) -> bool:
        kind, own = type(part), vars(part)
        if kind not in self.kinds:
            self.kinds[kind] = any(is_overridden(kind, name) for name in SAVING)
        if self.kinds[kind] or any(name in own for name in SAVING):
            return True
        return bool(part._state_dict_hooks) and not all(map(takes_prefix, part._state_dict_hooks.values()))

    @classmethod
    def of(cls, root: Module, names: Collection[str]) -> Walk:
        """Look at a module that is to be loaded from a checkpoint of these names."""
        walk = cls(root)
        if is_overridden(root, "load_state_dict"):
            walk.parts[""] = root
            walk._theirs(root, "")
        else:
            walk.into(root, "", names)
        return walk

    def _theirs(self, part: Module, prefix: str) -> None:
        self.theirs.update(own_tensors(part, prefix))
        self._look_at_hooks(part)
        for below, child in self._children(part, prefix):
            self._theirs(child, below)

    def made_on_the_fly(self) -> list[str]:
        """Names that a state_dict gives tensors which are not the module's memory: what fills that is not the same."""
        found: list[str] = []
        own = {id(tensor) for tensor in [*self.tensors.values(), *self.theirs.values()]} if self.makers else set()
        for prefix, part in self.makers:
            try:
                state = part.state_dict(prefix=prefix, keep_vars=True)
            except TypeError as failed:  # of other arguments
                pass_on(failed)
                continue
            for name, value in state.items():
                home = self.home_of(name)
                if isinstance(value, torch.Tensor) and id(value) not in own and not (home and home[1]):
                    found.append(name)
        return found

    def home_of(self, name: str) -> tuple[str, bool] | None:
        """Find the module that uses a name that is none of ``tensors``: a prefix, and whether it is that of a part.

        Otherwise it is that of the module that does not expect the name. None: nobody looks at it.
        """
        prefix, part = "", self.root
        while part is not None:
            if self.parts.get(prefix) is part:
                return prefix, True
            if (inner := wrapped(part)) is not None:
                part = inner
                continue
            head, dot, _ = name[len(prefix) :].partition(".")
            if not dot or head not in part._modules:
                return prefix, False
            part, prefix = part._modules[head], f"{prefix}{head}."
        return None if self.root is not None else ("", False)


def own_tensors(part: Module, prefix: str) -> dict[str, torch.Tensor]:
    """A module's parameters and persistent buffers, without those of its children."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in part._parameters.items():
        if parameter is not None:
            found[prefix + name] = parameter
    if part._buffers:
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                found[prefix + name] = buffer
    return found


def is_overridden(part: Module | type[Module], name: str) -> bool:
    """Whether a method of a module or a class of them is not torch's own."""
    kind = part if isinstance(part, type) else type(part)
    function = getattr(kind, name)
    own = kind is not part and name in vars(part)
    return own or function is not getattr(Module, name) or not _of_torch(function, module)


@dataclasses.dataclass
class Turns:
    """The remaining steps, in the order of torch, once the tensors that can be read directly are there."""

    walk: Walk
    given: dict[str, list[str]]
    """Names of the tensors that each part gets, by its prefix."""
    unexpected: dict[str, list[str]]
    """Names that the module of a prefix does not expect."""
    absent: set[str]
    """Names of tensors that the checkpoint lacks, and whose module says so."""
    strict: bool

    def has_own_say(self) -> bool:
        """Whether the module itself has judged its names."""
        return self.walk.root is not None and is_overridden(self.walk.root, "load_state_dict")

    def take(
        self, tensors: Mapping[str, torch.Tensor], settle: Callable[[str], None], copied: Collection[str]
    ) -> tuple[list[str], list[str]]:
        """Give every part its tensors and call the hooks, each at its turn; ``settle`` the copied ones at theirs.

        Returns:
            The names that ``load_state_dict`` would call missing and unexpected.

        Raises:
            StateDictError: a part could not load its tensors.
        """
        root = self.walk.root
        assert root is not None
        if is_overridden(root, "load_state_dict"):
            return self._told(*self._whole(root, tensors))
        missing: list[str] = []
        unexpected: list[str] = []
        errors: list[str] = []

        # Code of modules gets names as load_state_dict tells them, which begin with `inside` for those with `prefix`.
        def visit(part: Module, prefix: str, inside: str) -> None:
            at = len(prefix)
            if self.walk.parts.get(prefix) is part:
                mine = {inside + name[at:]: tensors[name] for name in self.given.get(prefix, ())}
                _load_state_dict(part, mine, inside, missing, unexpected, errors)
                return
            if (inner := wrapped(part)) is not None:
                visit(inner, prefix, f"{inside}{WRAPPED}.")
                _call_hooks(part, missing, unexpected)
                return
            for name in own_tensors(part, prefix):
                if name in copied:
                    settle(name)
                if name in self.absent:
                    missing.append(inside + name[at:])
            if prefix in self.walk.extra:
                missing.append(inside + self.walk.extra[prefix][at:])
            unexpected.extend(inside + name[at:] for name in self.unexpected.get(prefix, ()))
            for name, child in part._modules.items():
                if child is not None:
                    visit(child, f"{prefix}{name}.", f"{inside}{name}.")
            _call_hooks(part, missing, unexpected)

        visit(root, "", "")
        if errors:
            raise StateDictError(failed(root, errors))
        return self._told(missing, unexpected)

    def _told(self, missing: list[str], unexpected: list[str]) -> tuple[list[str], list[str]]:
        root = self.walk.root
        if root is None or not self.walk.wraps:
            return missing, unexpected
        return [in_state_dict(root, name) for name in missing], [in_state_dict(root, name) for name in unexpected]

    def _whole(self, root: Module, tensors: Mapping[str, torch.Tensor]) -> tuple[list[str], list[str]]:
        try:
            told: Any = root.load_state_dict(dict(tensors), strict=self.strict)
        except RuntimeError as error:
            pass_on(error)
            if type(error) is not RuntimeError:
                raise
            raise StateDictError(f"{error}\nIt was raised by the load_state_dict of {_named(root)}") from error
        return list(getattr(told, "missing_keys", ())), list(getattr(told, "unexpected_keys", ()))


def _load_state_dict(
    part: Module,
    tensors: dict[str, torch.Tensor],
    prefix: str,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """The inner function of ``Module.load_state_dict``."""
    part._load_from_state_dict(tensors, prefix, {}, True, missing, unexpected, errors)
    for name, child in part._modules.items():
        if child is not None:
            below = f"{prefix}{name}."
            mine = {key: tensor for key, tensor in tensors.items() if key.startswith(below)}
            _load_state_dict(child, mine, below, missing, unexpected, errors)
    _call_hooks(part, missing, unexpected)


def _call_hooks(part: Module, missing: list[str], unexpected: list[str]) -> None:
    keys = _IncompatibleKeys(missing, unexpected)  # hooks change the lists
    for hook in part._load_state_dict_post_hooks.values():
        if hook(part, keys) is not None:
            raise AssertionError(
                "Hooks registered with ``register_load_state_dict_post_hook`` are not expected to return new values, "
                "if incompatible_keys need to be modified, it should be done inplace."
            )


def failed(root: Module, errors: list[str]) -> str:
    """In torch's words, and whose fault it is that something was loaded."""
    lines = "\n\t".join(errors)
    return f"Error(s) in loading state_dict for {_named(root)}:\n\t{lines}"


def _named(root: Module) -> str:
    return f"{type(root).__name__}; modules that take part in their loading were called: it may be partly loaded"
