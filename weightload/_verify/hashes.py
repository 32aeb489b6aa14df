"""Hashes of files: SHA-256, or a CRC of those that stores keep of their objects."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from weightload._remote.optional import optional
from weightload._verify.digests import KINDS, SHA256


class Hash(Protocol):
    """Takes a file's bytes in order."""

    def update(self, data: Any, /) -> object: ...

    def hexdigest(self) -> str: ...


class Crc:
    """A CRC, by the processor's instructions. That of two pieces is made of theirs, without their bytes."""

    def __init__(self, kind: str) -> None:
        self._of, self._combined = _functions(kind)
        self._digits = 2 * KINDS[kind].bytes
        self._value = self._count = 0

    def update(self, data: Any) -> None:
        self._value = self._of(data, self._value)
        self._count += len(data)

    def append(self, later: Crc) -> None:
        """Append the next piece, which another thread has hashed."""
        self._value = self._combined(self._value, later._value, later._count)
        self._count += later._count

    def hexdigest(self) -> str:
        return f"{self._value:0{self._digits}x}"


def new(kind: str) -> Hash:
    """Make a hash that has got no bytes yet."""
    return hashlib.sha256() if kind == SHA256 else Crc(kind)


def require(kinds: Iterable[str]) -> None:
    """Raise where one of these cannot be had.

    Raises:
        ModuleNotFoundError: a CRC, and its library is not installed.
    """
    if any(kind != SHA256 for kind in kinds):
        _library()


@functools.cache
def _functions(kind: str) -> tuple[Callable[[Any, int], int], Callable[[int, int, int], int]]:
    """Return two functions: to continue a CRC with bytes, and to combine two CRCs, given the second's byte count."""
    library = _library()
    return getattr(library, kind), getattr(library, f"combine_{kind}")


def _library() -> Any:
    return optional("awscrt.checksums", "a CRC of verify=", "'weightload[crc]'")
