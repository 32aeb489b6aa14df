"""install: weightload in the place of safetensors in the frameworks that are named, until it is taken back."""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from weightload._base.handlers import pass_on

if TYPE_CHECKING:
    from weightload._install.framework import Framework
    from weightload._install.swap import Swap

logger = logging.getLogger("weightload")

FRAMEWORKS = ("transformers", "diffusers", "accelerate", "peft", "sentence_transformers", "fastvideo")

_lock = threading.RLock()
# Guarded by it. Of each framework what was swapped, and how many want it: ``install`` once, each ``installed`` once.
_swaps: dict[str, Swap] = {}
_blocks: collections.Counter[str] = collections.Counter()
_for_good: set[str] = set()


def install(*frameworks: str) -> None:
    """Load by weightload in these frameworks from now on, in this process.

    They keep their own calls (``from_pretrained`` and the like), and what they make of the tensors. In their modules,
    and nowhere else, safetensors' ``safe_open``, ``load_file``, ``load_model`` are replaced, also where they were bound
    to names before, and in modules that are imported later. What weightload does not serve (a device that it cannot
    load to, another framework than torch) goes to safetensors. To install what is installed changes nothing. What was
    replaced is logged, at level INFO.

    Args:
        frameworks: ``"transformers"``, ``"diffusers"``, ``"accelerate"``, ``"peft"``, ``"sentence_transformers"``,
            ``"fastvideo"`` (whose ``safetensors_weights_iterator`` is replaced, too).

    Raises:
        ValueError: no such framework.
        ModuleNotFoundError: it is not there.
        RuntimeError: it is a version that reads weights in another place: nothing was replaced in any of them.
    """
    _add(frameworks, for_good=True)


def uninstall(*frameworks: str) -> None:
    """Take it back, in all frameworks if none is named: their modules have their names for safetensors' again.

    What they have loaded stays. Inside of a block of ``installed`` it is taken back at the end of the block.

    Raises:
        ValueError: no such framework.
    """
    _require_known(frameworks)
    with _lock:
        for name in frameworks or FRAMEWORKS:
            _for_good.discard(name)
            _take_back_if_unwanted(name)


@contextlib.contextmanager
def installed(*frameworks: str) -> Iterator[None]:
    """``with installed("diffusers"):``: the same for a while, of all threads of the process.

    Raises:
        ValueError, ModuleNotFoundError, RuntimeError: as ``install``.
    """
    _add(frameworks, for_good=False)
    try:
        yield
    finally:
        with _lock:
            for name in frameworks:
                _blocks[name] -= 1
                _take_back_if_unwanted(name)


def _add(names: tuple[str, ...], for_good: bool) -> None:
    _require_known(names)
    with _lock:
        ready = {name: _prepared(name) for name in dict.fromkeys(names) if name not in _swaps}
        for name, swap in ready.items():
            replaced = swap.apply()
            _swaps[name] = swap
            logger.info("weightload is installed in %s: %s", name, ", ".join(replaced))
        for name in names:
            if for_good:
                _for_good.add(name)
            else:
                _blocks[name] += 1


def _take_back_if_unwanted(name: str) -> None:
    if name in _swaps and name not in _for_good and not _blocks[name]:
        _swaps.pop(name).undo()


def _require_known(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in FRAMEWORKS:
            raise ValueError(f"no such framework: {name!r}; must be one of {', '.join(map(repr, FRAMEWORKS))}")


def _prepared(name: str) -> Swap:
    """What will be swapped in a framework, which is imported as far as it reads weights.

    Raises:
        ModuleNotFoundError, RuntimeError: as ``install``.
    """
    from weightload._install.stand_ins import pairs
    from weightload._install.swap import Swap

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
    """What a name of a framework's module stands for; imports the module."""
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
        f"cannot install weightload in {name} {version}: it has no {module}.{attribute} that reads weights, so it "
        "reads them elsewhere; weightload/integrations/README.md names the versions that were tried"
    )
