"""The steps before and after every iterator: opening files, picking tensors, closing at the interpreter's exit."""

from __future__ import annotations

import atexit
import itertools
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from weightload import _C, settings
from weightload._base.addresses import is_address, shown
from weightload._base.dtypes import PACK
from weightload._base.paths import Path, as_text
from weightload._checkpoint.duplicates import remember_copy, without_repeats
from weightload._parts.shards import Part, Parts

if TYPE_CHECKING:
    from weightload._cache.folder import Cache

__all__ = [
    "Names",
    "Opening",
    "Path",
    "open_files",
    "parts_in_order",
    "predicate",
    "select",
    "select_all",
]

Names = Collection[str] | Callable[[str], bool]
Opening = Callable[[], list[_C.CheckpointFile]]
"""Opens the files of a load. An exception's traceback keeps what its frames have: code that fails clears the list."""


def open_files(paths: Sequence[Path], cache: Cache | None = None) -> list[_C.CheckpointFile]:
    """Open checkpoint files and validate their headers, in parallel; also what servers have, or copies in a ``cache``.

    Raises:
        TypeError, ValueError: as ``paths.as_text``.
        ModuleNotFoundError: an address, and the library for it is not installed.
    """
    texts = [as_text(path) for path in paths]
    if any(map(is_address, texts)):
        return _open_mixed(texts, cache)
    encoded = list(map(os.fsencode, texts))
    # Counting the CPUs of a process takes several times as long as opening a small file.
    threads = settings.current().thread_count() if len(encoded) > 1 else 1
    return _C.open_files(encoded, threads)


def _open_mixed(texts: list[str], cache: Cache | None) -> list[_C.CheckpointFile]:
    from weightload._remote.hub import local as in_cache  # here: most never need it
    from weightload._remote.source import open_addresses

    texts = list(map(in_cache, texts))
    remote = [text for text in texts if is_address(text)]
    local = [text for text in texts if not is_address(text)]
    files = open_addresses(remote) if cache is None else cache.open(remote)
    for address, file in zip(remote, files, strict=True):
        if not file.is_remote:
            remember_copy(file.path, shown(address))
    opened = dict(zip(remote, files, strict=True))
    files.clear()
    opened.update(zip(local, open_files(local), strict=True))
    return [opened[text] for text in texts]


def select(file: _C.CheckpointFile, names: Names | None) -> list[int]:
    """Numbers of the file's tensors that ``names`` (a collection or a predicate; None for all) picks."""
    if names is None:
        return list(range(len(file)))
    picked = predicate(names)
    in_file = file.names()
    del file  # what a predicate raises has this frame in its traceback, and would keep the file open
    return [number for number, name in enumerate(in_file) if picked(name)]


def select_all(files: Sequence[_C.CheckpointFile], names: Names | None, duplicates: str = "error") -> list[list[int]]:
    """``select`` for each file, and one tensor of each name; see ``without_repeats``."""
    picked = None if names is None else predicate(names)  # once: an iterator among them can be read once
    selection = list(map(select, files, itertools.repeat(picked)))  # no frame that has a file: see select
    return without_repeats(files, selection, duplicates, everything=names is None)


def parts_in_order(
    files: Sequence[_C.CheckpointFile], selection: Sequence[Sequence[int]], parts: Parts
) -> list[Part | None]:
    """The parts of the selected tensors, in the order of the load and in the dimensions of the files; none of none."""
    if not parts:
        return []
    found: list[Part | None] = []
    for file, numbers in zip(files, selection, strict=True):
        tensors: list[tuple[Any, ...]] = file.tensors()
        for number in numbers:
            name, dtype = tensors[number][:2]
            part = parts.get(name)
            if part and dtype in PACK:
                part = (*part[:-1], tuple((PACK[dtype] * begin, PACK[dtype] * end) for begin, end in part[-1]))
            found.append(part)
    return found


def predicate(names: Names) -> Callable[[str], bool]:
    """Whether a name is picked.

    Raises:
        TypeError: ``names`` is neither a collection of names nor a predicate.
    """
    if isinstance(names, str):
        raise TypeError("names must be a collection of tensor names or a predicate, not one string")
    if callable(names):
        return names
    if isinstance(names, (bytes, bytearray, memoryview)) or not isinstance(names, Iterable):
        raise TypeError(f"names must be a collection of tensor names or a predicate, not {type(names).__name__}")
    wanted = set()
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names must be a collection of tensor names or a predicate; {name!r} is no name")
        wanted.add(name)
    return wanted.__contains__


# In C++: a collection of weak references calls back in Python, where the exception of a signal handler is lost.
@atexit.register
def _leave_interpreter() -> None:
    if (transport := sys.modules.get("weightload._remote.transport")) is not None:
        transport.leave_interpreter()
    _C.leave_interpreter()
