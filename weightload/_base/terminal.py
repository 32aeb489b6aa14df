"""Where a person may be watching: stderr, which may be None, closed, or somebody's object, and fail at any time."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from weightload._base.handlers import forgiven, pass_on


def can_write(stream: TextIO | None) -> bool:
    """Whether there is something to write to; writing may fail all the same."""
    try:
        return stream is not None and callable(stream.write) and not getattr(stream, "closed", False)
    except Exception as failed:  # of other people's objects anything may come
        pass_on(failed)
        return False


def is_terminal(stream: TextIO | None) -> bool:
    """Whether this is a terminal; what does not say so is none."""
    try:
        return can_write(stream) and bool(stream.isatty())  # type: ignore[union-attr]
    except Exception as failed:
        pass_on(failed)
        return False


def to_stderr(line: str) -> None:
    """Write a line to stderr, if that is possible."""
    if can_write(sys.stderr):
        with forgiven(Exception):
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


class Forgiving:
    """A stream whose failures go unnoticed: what is shown on it is not worth a load."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or not."""
        with forgiven(Exception):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        with forgiven(Exception):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
