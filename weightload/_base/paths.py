"""Paths as every public call takes them: one, or several, as text or bytes."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterable

from weightload._base.addresses import require_known
from weightload._base.handlers import pass_on

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Paths = Iterable[Path] | Path

MAX_SHOWN = 100  # characters of a refused value in a message


def as_text(path: Path) -> str:
    """A path as ``str``; bytes that are no text keep their value (``os.fsdecode``), so that the file is found again.

    Raises:
        TypeError: no path.
        FileNotFoundError: an empty path, which some functions take for the current directory.
        ValueError: a path with a zero character, which the system would take for its end.
    """
    try:
        text = os.fsdecode(path)
    except TypeError as failed:
        pass_on(failed)
        raise TypeError(f"expected str, bytes or os.PathLike object, not {_shown(path)}") from None
    if not text:
        raise FileNotFoundError(errno.ENOENT, "the path is empty", text)
    if "\0" in text:
        raise ValueError(f"embedded null byte in path {_shown(text)}")
    require_known(text)
    return text


def path_list(files: Paths) -> list[str]:
    """The paths of a load in their order; one path is taken as one file, and a set, which has no order, by name.

    Raises:
        TypeError: neither a path nor several.
        ValueError: as ``as_text``.
    """
    if isinstance(files, (str, bytes, os.PathLike)):
        return [as_text(files)]
    # An open file is its lines to Python.
    if isinstance(files, (bytearray, memoryview, io.IOBase)) or not isinstance(files, Iterable):
        raise TypeError(f"expected str, bytes or os.PathLike object, or several, not {_shown(files)}")
    paths = [as_text(path) for path in files]
    # The order of a set differs from process to process.
    return sorted(paths, key=natural_key) if isinstance(files, (set, frozenset)) else paths


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that compares runs of digits as numbers, so that ``shard-2`` comes before ``shard-10``."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    # By length and text, not by int(): that refuses numbers of thousands of digits, and an index may have such names.
    return [(0, *_number(part)) if "0" <= part[0] <= "9" else (1, 0, part) for part in parts]


def _number(digits: str) -> tuple[int, str]:
    """A key that orders runs of digits as the numbers they are, and equal numbers by their zeros."""
    significant = digits.lstrip("0")
    return len(significant), f"{significant} {digits}"


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception as failed:  # of other people's objects anything may come
        pass_on(failed)
        text = "an object"
    return f"{text[:MAX_SHOWN]}{'...' * (len(text) > MAX_SHOWN)} ({type(value).__name__})"
