"""How tables write times, ratios and sizes: in columns of one width, blank where there is nothing."""

from __future__ import annotations

import textwrap

WIDTH = 100  # of what is printed for people


def duration(seconds: float | None) -> str:
    if seconds is None:
        return " " * 9
    return f"{seconds:7.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:6.2f} ms"


def ratio(value: float | None) -> str:
    return f"{value:6.2f}x" if value else " " * 7


def megabytes(value: int | None) -> str:
    return f"{value / 1e6:7.0f} MB" if value is not None else " " * 10


def wrapped(text: str) -> str:
    """A paragraph in lines that fit."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)
