"""What every iterator does before and after: opening files, picking tensors, closing at the interpreter's exit."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Collection, Sequence

from weightload import _C, settings

Path = str | os.PathLike[str]
Names = Collection[str] | Callable[[str], bool]


def open_files(paths: Sequence[Path]) -> list[_C.CheckpointFile]:
    """Open checkpoint files and validate their headers, in parallel.

    Raises:
        ValueError: a path with a zero character, which the system would take for its end.
    """
    encoded = [os.fsencode(path) for path in paths]
    for path in encoded:
        if b"\0" in path:
            raise ValueError(f"embedded null byte in path {os.fsdecode(path)!r}")
    # Counting the CPUs of a process takes several times as long as opening a small file.
    threads = settings.current().thread_count() if len(encoded) > 1 else 1
    return _C.open_files(encoded, threads)


def select(file: _C.CheckpointFile, names: Names | None) -> list[int]:
    """Numbers of the file's tensors that ``names`` (a collection or a predicate; None for all) picks."""
    if names is None:
        return list(range(len(file)))
    picked = _predicate(names)
    return [number for number, name in enumerate(file.names()) if picked(name)]


def select_all(files: Sequence[_C.CheckpointFile], names: Names | None) -> list[list[int]]:
    """``select`` for each file."""
    picked = None if names is None else _predicate(names)  # once: an iterator among them can be read once
    return [select(file, picked) for file in files]


def _predicate(names: Names) -> Callable[[str], bool]:
    if isinstance(names, str):
        raise TypeError("names must be a collection of tensor names or a predicate, not one string")
    return names if callable(names) else set(names).__contains__


# In C++: a collection of weak references calls back in Python, where the exception of a signal handler is lost.
atexit.register(_C.leave_interpreter)
