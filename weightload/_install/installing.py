"""install: weightload in the place of safetensors in the frameworks that are named, until it is taken back."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from weightload._base.handlers import pass_on
from weightload._install.swap import Swap, after_fork

if TYPE_CHECKING:
    from weightload._install.framework import Framework

logger = logging.getLogger("weightload")

FRAMEWORKS = ("transformers", "diffusers", "accelerate", "peft", "sentence_transformers", "fastvideo")

# Guards what is swapped, and is held while frameworks are imported. Who wants what is written down first: an interrupt
# may come between any two lines, and the next call goes by what is written.
_lock = threading.RLock()
_swaps: dict[str, Swap] = {}  # of each framework, perhaps not all of it: a swap may be applied and undone again
_for_good: set[str] = set()
_said: set[str] = set()


class _Block:
    """A block of ``installed`` that is being run. Lives as long as its frame, whatever interrupts the end of that."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names


_blocks: weakref.WeakSet[_Block] = weakref.WeakSet()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # the one from before may be held by a thread that is not here
    after_fork()


os.register_at_fork(after_in_child=_after_fork)


def install(*frameworks: str) -> None:
    """Load by weightload in these frameworks from now on, in this process.

    They keep their own calls (``from_pretrained`` and the like), and what they make of the tensors. In their modules,
    and nowhere else, safetensors' ``safe_open``, ``load_file``, ``load_model`` are replaced, also where they were bound
    to names before, and in modules that are imported later. What weightload does not serve (a device that it cannot
    load to, another framework than torch) goes to safetensors. To install what is installed changes nothing. What was
    replaced is logged, at level INFO the first time. The frameworks are imported, as far as they read weights:
    environment variables that they look at are to be set before.

    Args:
        frameworks: ``"transformers"``, ``"diffusers"``, ``"accelerate"``, ``"peft"``, ``"sentence_transformers"``,
            ``"fastvideo"`` (whose ``safetensors_weights_iterator`` is replaced, too).

    Raises:
        ValueError, TypeError: no such framework, or none is named.
        ModuleNotFoundError: it is not there.
        RuntimeError: it is a version that reads weights in another place: nothing was replaced in any of them.
    """
    frameworks = _some(frameworks)
    with _lock:
        _prepare(frameworks)
        _for_good.update(frameworks)
        _settle(frameworks)


def uninstall(*frameworks: str) -> None:
    """Take it back, in all frameworks if none is named: their modules have their names for safetensors' again.

    What they have loaded stays. Inside of a block of ``installed`` it is taken back at the end of the block.

    Raises:
        ValueError: no such framework.
    """
    frameworks = _known(frameworks) or FRAMEWORKS
    _for_good.difference_update(frameworks)
    with _lock:
        _settle(frameworks)


@contextlib.contextmanager
def installed(*frameworks: str) -> Iterator[None]:
    """``with installed("diffusers"):``: the same for a while, of all threads of the process.

    Raises:
        ValueError, TypeError, ModuleNotFoundError, RuntimeError: as ``install``.
    """
    frameworks = _some(frameworks)
    block = _Block(frameworks)
    try:
        with _lock:
            _prepare(frameworks)
            _blocks.add(block)
            _settle(frameworks)
        yield
    finally:
        _blocks.discard(block)
        with _lock:
            _settle(frameworks)


def _prepare(names: Iterable[str]) -> None:
    """Before anything is replaced in any of them: all of them are there, and known."""
    ready = {name: _prepared(name) for name in dict.fromkeys(names) if name not in _swaps}
    _swaps.update(ready)


def _settle(names: Iterable[str]) -> None:
    """Have frameworks be as they are wanted; to be called with the lock held, and again after an interrupt."""
    for name in dict.fromkeys(names):
        swap = _swaps.get(name)
        if swap is None:
            continue
        if name in _for_good or any(name in block.names for block in list(_blocks)):
            replaced = swap.apply()
            if replaced:
                # At INFO once: a server may do it around each of its loads.
                level = logging.DEBUG if name in _said else logging.INFO
                _said.add(name)
                logger.log(level, "weightload is installed in %s: %s", name, ", ".join(replaced))
        else:
            swap.undo()
            del _swaps[name]


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    """The frameworks, by the names that they are imported by; those that they are installed by are known, too."""
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"frameworks are named one by one: must be names (str), not {type(name).__name__}")
        if name.replace("-", "_") not in FRAMEWORKS:
            raise ValueError(f"no such framework: {name!r}; must be one of {', '.join(map(repr, FRAMEWORKS))}")
    return tuple(name.replace("-", "_") for name in names)


def _some(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError(f"no framework is named; they are {', '.join(map(repr, FRAMEWORKS))}")
    return _known(names)


def _prepared(name: str) -> Swap:
    """The swaps in a framework, which is imported as far as it reads weights.

    Raises:
        ModuleNotFoundError, RuntimeError: as ``install``.
    """
    from weightload._install.stand_ins import pairs

    framework: Framework = importlib.import_module(f"weightload.integrations.{name}").FRAMEWORK
    if importlib.util.find_spec(framework.package) is None:
        raise ModuleNotFoundError(f"cannot install weightload in {name}: there is no package {name!r}", name=name)
    there = [(where, attribute, _bound_to(framework, where, attribute)) for where, attribute in framework.sites]
    known = [*pairs(), *framework.pairs()]
    replaced = {id(before) for before, _ in known}
    for where, attribute, value in there:
        if id(value) not in replaced:
            raise _moved(framework, where, attribute)
    return Swap(framework.package, known)


def _bound_to(framework: Framework, where: str, attribute: str) -> object:
    """The object that a name of a framework's module stands for; imports the module."""
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        pass_on(error)
        if error.name is None or not where.startswith(error.name):
            raise  # something that it needs
        raise _moved(framework, where, attribute) from None
    if attribute not in vars(module):
        raise _moved(framework, where, attribute)
    return vars(module)[attribute]


def _moved(framework: Framework, module: str, attribute: str) -> RuntimeError:
    name = framework.package
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        pass_on(error)
        version = "(of unknown version)"
    return RuntimeError(
        f"cannot install weightload in {name} {version}: its {module}.{attribute} is not what reads weights in the "
        "versions that were tried (weightload/integrations/README.md), or somebody else has replaced it"
    )
