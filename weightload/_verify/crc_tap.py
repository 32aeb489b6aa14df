"""The CRC of a file or a server's object, made of those of the pieces that a load reads, in any order."""

from __future__ import annotations

import bisect
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from weightload._verify.hashes import Crc
from weightload._verify.tap import behind_start


class Piece(NamedTuple):
    """An answer, or what was read at a time, that was hashed when it came."""

    end: int
    crc: Crc


class CrcReading:
    """Pieces that have no bytes in common.

    Args:
        start: what the file begins with, where that is known.
        kind: of the CRC.
    """

    def __init__(self, kind: str, start: memoryview | None = None) -> None:
        self._begins: list[int] = []  # in order
        self._pieces: dict[int, Piece] = {}
        if start:
            self.put(0, Piece(len(start), crc_of(kind, start)))

    def put(self, begin: int, piece: Piece) -> bool:
        """Whether it belongs here, or is here: it does not belong here where a byte of it has been given before."""
        known = self._pieces.get(begin)
        if known is not None and known.end == piece.end and known.crc.hexdigest() == piece.crc.hexdigest():
            return True
        at = bisect.bisect_right(self._begins, begin)
        if at and self._pieces[self._begins[at - 1]].end > begin:
            return False
        if at < len(self._begins) and self._begins[at] < piece.end:
            return False
        self._begins.insert(at, begin)
        self._pieces[begin] = piece
        return True

    def in_order(self, size: int) -> Iterator[tuple[int, int, Crc | None]]:
        """All ranges of an object of this size, each with its CRC; None for what was not given."""
        at = 0
        for begin in self._begins:
            piece = self._pieces[begin]
            if at < begin:
                yield at, begin, None
            yield begin, piece.end, piece.crc
            at = piece.end
        if at < size:
            yield at, size, None


class Reader(Protocol):
    """Reads files of which a tap is not told."""

    def read_what_was_left(self, tap: FileTap) -> None:
        """Read the file of this tap."""


class FileTap:
    """CRCs of what a load reads of a local file. The core's threads tell it, see ``_C.CheckpointFile.with_tap``.

    It needs no lock: they append, and ``readings`` are asked for when the load is over.

    Args:
        kind: of the CRC.
        reader: whoever reads the file at once where the load does not. Weak, as the core's references are none that the
            garbage collector can follow.
    """

    def __init__(self, kind: str, reader: weakref.ref[Reader]) -> None:
        self._kind, self._reader = kind, reader
        self._pieces: list[tuple[int, Piece]] = []
        self.is_left = False

    def take(self, begin: int, data: memoryview) -> None:
        """Bytes that were read, from an offset on."""
        self._pieces.append((begin, Piece(begin + len(data), crc_of(self._kind, data))))

    def leave(self) -> None:
        """It will not be told."""
        self.is_left = True
        reader = self._reader()
        if reader is not None:
            reader.read_what_was_left(self)

    @property
    def readings(self) -> list[CrcReading]:
        """One, unless ranges were read twice that overlap, or that had different bytes."""
        found = [CrcReading(self._kind)]
        for begin, piece in sorted(self._pieces, key=lambda item: item[0]):
            put(found, begin, piece, lambda: CrcReading(self._kind))
        return found

    def close(self) -> None:
        """Let go of what it knows."""
        self._pieces = []


class CrcTap:
    """CRCs of what comes from a server. ``tap.Tap`` instead keeps the bytes for a hash that wants them in order.

    Attributes:
        lock: of all below.
        used: whether it was given anything but the header.
        readings: one, unless different bytes came for the same range, or ranges that overlap.
    """

    keeps = False

    def __init__(self, source: Any, header_bytes: int, kind: str) -> None:
        self._source, self._header_bytes, self._kind = source, header_bytes, kind
        self._start = memoryview(source.start)
        self.lock = threading.Condition()
        self.used = False
        self.readings = [CrcReading(kind, self._start)]
        source.tap = self

    def give(self, begin: int, data: Any) -> None:
        """Take bytes of a server's answer, from any thread. Raises what ``behind_start`` raises."""
        end = begin + len(data)
        begin, rest = behind_start(self._source, self._start, begin, memoryview(data))
        piece = Piece(end, crc_of(self._kind, rest))
        with self.lock:
            self.used = self.used or end > self._header_bytes
            if begin < end:
                put(self.readings, begin, piece, lambda: CrcReading(self._kind, self._start))

    def close(self) -> None:
        """It is told of nothing any more."""
        self._source.tap = None


def put(readings: list[CrcReading], begin: int, piece: Piece, another: Callable[[], CrcReading]) -> None:
    """Put a piece where it belongs: into one of the readings, or into another one behind them."""
    if not any(reading.put(begin, piece) for reading in readings):
        readings.append(another())
        readings[-1].put(begin, piece)


def crc_of(kind: str, data: memoryview) -> Crc:
    crc = Crc(kind)
    crc.update(data)
    return crc


__all__ = ["CrcReading", "CrcTap", "FileTap", "crc_of"]
