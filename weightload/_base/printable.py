"""Names out of files, as they may stand in a message."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text, with what would break a line or steer a terminal escaped, as the core does it in its errors."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
