"""Puts objects in the place of others in the modules of one package: by identity, whatever they are called there."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Modules that a thread of the parent was importing when this process was forked: nobody ends that here.
_abandoned: set[str] = set()


def _is_being_imported(module: object) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def after_fork() -> None:
    """To be called in a forked child."""
    _abandoned.update(name for name, module in list(sys.modules.items()) if _is_being_imported(module))


class Swap:
    """A swap in all modules of a package: those that are imported by now, and those that are while it is applied.

    What a function of the package imports when it is called is not reached: it binds no name of a module. Whatever
    interrupts a call, another one ends what it began.

    Args:
        package: its name; the modules below it count.
        pairs: what is replaced, and by what.
    """

    def __init__(self, package: str, pairs: Iterable[tuple[object, object]]) -> None:
        self._package = package
        self._pairs = list(pairs)  # keeps them alive: they are known by where they are
        self._there = {id(before): after for before, after in self._pairs}
        self._back = {id(after): before for before, after in self._pairs}
        self._finder = _Finder(package, self.apply_to)

    def apply(self) -> list[str]:
        """Swap. Returns what was replaced, as ``module.name``."""
        if self._finder not in sys.meta_path:
            sys.meta_path.insert(0, self._finder)
        for name, module in self._modules():
            if name not in _abandoned and _is_being_imported(module):
                # Another thread began to import it before the finder was there: waits for its end.
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
        return [f"{name}.{attribute}" for name, module in self._modules() for attribute in _swap(module, self._there)]

    def undo(self) -> None:
        """Take it back. What somebody else has put in a swapped one's place meanwhile stays."""
        while self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        for _, module in self._modules():
            _swap(module, self._back)

    def apply_to(self, module: ModuleType) -> None:
        """Swap in a module that was imported just now."""
        _swap(module, self._there)
        # Another thread may be taking it back: the finder goes first, and then it looks at all modules.
        if self._finder not in sys.meta_path:
            _swap(module, self._back)

    def _modules(self) -> Iterator[tuple[str, ModuleType]]:
        for name, module in list(sys.modules.items()):
            if _is_below(name, self._package) and isinstance(module, ModuleType):
                yield name, module


def _is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _swap(module: ModuleType, table: dict[int, object]) -> list[str]:
    # Its dictionary: attributes of lazy modules would be imported.
    names = vars(module)
    found = [name for name, value in list(names.items()) if id(value) in table]
    for name in found:
        names[name] = table[id(names[name])]
    return found


class _Finder(MetaPathFinder):
    """Leaves the finding to the others, and looks at a module when it has run."""

    def __init__(self, package: str, imported: Any) -> None:
        self._package, self._imported = package, imported
        self._asking = threading.local()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        # Somebody else's finder may ask all of them, too, and so this one again.
        if not _is_below(name, self._package) or getattr(self._asking, "name", None) == name:
            return None
        self._asking.name = name
        try:
            spec = self._found_by_others(name, path, target)
        finally:
            self._asking.name = None
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self._imported)
        return spec

    def _found_by_others(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                return spec
        return None


class _Loader(Loader):
    """Another loader, as whom the module knows it: this one is gone before the module runs."""

    def __init__(self, loader: Loader, imported: Any) -> None:
        self._loader, self._imported = loader, imported

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.loader is self:
            spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._imported(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
