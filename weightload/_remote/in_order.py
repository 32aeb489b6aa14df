"""Reads an object of a server that knows no ranges: once, from its beginning to its end."""

from __future__ import annotations

import asyncio
from typing import Any

from weightload._remote.answers import (
    FIRST_BYTES,
    Answer,
    InHand,
    Saver,
    Tap,
    broken_off,
    header_end,
    identity,
    require_plain,
    require_same,
    tried_again,
)
from weightload._remote.failures import CUT_OFF, read_error, reason_of, translated
from weightload._remote.stores import Place, library
from weightload._remote.transport import asked

CHUNK = 1 << 20  # bytes that are taken from the connection at a time
# Bytes passed over on the way to a later range are kept for the next one that asks: threads that read in order do not
# ask in order.
MOST_KEPT = 256 << 20


class Chunk:
    """Bytes that have come, and how many of them have not been given out yet."""

    def __init__(self, begin: int, data: Any) -> None:
        self.begin, self.data = begin, memoryview(data)
        self.end = begin + len(self.data)
        self.left = len(self.data)

    def give(self, begin: int, data: bytearray) -> int:
        """Copy what there is of a range that begins at ``begin``; the number of bytes."""
        low, high = max(begin, self.begin), min(begin + len(data), self.end)
        if low >= high:
            return 0
        data[low - begin : high - begin] = self.data[low - self.begin : high - self.begin]
        self.left -= high - low
        return high - low


class InOrder:
    """One object, whose bytes come in one stream. Who asks for what has passed by has it begun again."""

    def __init__(self, place: Place, where: str, meta: Any) -> None:
        self.place, self.where = place, where
        self.size: int = meta["size"]
        self.same = identity(meta)
        self.start = memoryview(b"")
        self.tap: Tap | None = None  # told of all that a load is given
        self.saver: Saver | None = None  # told of all that comes
        self._turn = asyncio.Lock()
        self._stream: Any = None
        self._kept: list[Chunk] = []  # one behind the other, the last ends at _position; some in between may be gone
        self._position = 0  # where the stream is

    @classmethod
    async def open(cls, place: Place, where: str) -> InOrder:
        answer = await cls._begin(place, where)
        opened = cls(place, where, answer.meta)
        opened._stream = answer.stream(min_chunk_size=CHUNK)
        opened.start = memoryview(await opened._fetch(0, min(FIRST_BYTES, opened.size)))
        length = header_end(opened.start, opened.size)
        if len(opened.start) < length:
            rest = await opened._fetch(len(opened.start), length)
            opened.start = memoryview(b"".join((opened.start, rest)))
        return opened

    @staticmethod
    async def _begin(place: Place, where: str) -> Any:
        try:
            answer = await library().get_async(place.store, place.path)
        except Exception as error:
            raise translated(error, where) from None
        require_plain(answer, where)
        return answer

    def ask(self, offset: int, count: int, tapped: bool = True) -> Answer | InHand:
        return asked(self._fetch, self.start, offset, count, self.tap if tapped else None)

    def begin_direct(self, offset: int, count: int) -> None:
        """It has no ranges."""

    async def _fetch(self, begin: int, end: int) -> bytearray:
        """A range; a stream that breaks off is begun again, a few times."""
        async with self._turn:
            data: bytearray = await tried_again(lambda: self._read_anew(begin, end))
        if self.saver is not None:
            await self.saver(begin, data)
        return data

    async def _read_anew(self, begin: int, end: int) -> bytearray:
        """A range, after a failure of a new stream."""
        try:
            return await self._read(begin, end)
        except BaseException:  # also when nobody wants it any more: what was on its way is lost
            self._stream = None
            self._kept.clear()
            raise

    async def _read(self, begin: int, end: int) -> bytearray:
        data = bytearray(end - begin)
        got = sum(chunk.give(begin, data) for chunk in self._kept)
        if self._stream is None or got < min(self._position, end) - begin:
            await self._begin_again()
            got = 0
        while self._position < end:
            chunk = Chunk(self._position, await self._next())
            self._position = chunk.end
            got += chunk.give(begin, data)
            self._kept.append(chunk)
            self._let_go(begin)
        self._kept = [chunk for chunk in self._kept if chunk.left > 0]
        if got != len(data):
            raise read_error(self.where, "the server gave another number of bytes than it said")
        return data

    def _let_go(self, begin: int) -> None:
        """Let go of chunks that nobody has asked for, and of those that have been given out."""
        self._kept = [chunk for chunk in self._kept if chunk.left > 0]
        while self._kept and self._position - self._kept[0].begin > MOST_KEPT and self._kept[0].end <= begin:
            self._kept.pop(0)

    async def _begin_again(self) -> None:
        answer = await self._begin(self.place, self.where)
        require_same(answer, self.same, self.where)
        self._stream, self._position = answer.stream(min_chunk_size=CHUNK), 0
        self._kept.clear()

    async def _next(self) -> Any:
        try:
            return await anext(self._stream)
        except StopAsyncIteration:
            raise broken_off(self.where, CUT_OFF) from None
        except Exception as error:
            raise broken_off(self.where, reason_of(error)) from None
