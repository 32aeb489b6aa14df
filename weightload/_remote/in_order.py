"""Reads an object of a server that knows no ranges: once, from its beginning to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from weightload._remote.answers import Answer, require_plain
from weightload._remote.failures import translated
from weightload._remote.stores import Place, library
from weightload._remote.transport import transport
from weightload.errors import ReadError, located

CHUNK = 1 << 20  # bytes that are taken from the connection at a time
# What was passed over on the way to a later range is kept for who asks for it next: threads that read in order do not
# ask in order.
MOST_KEPT = 256 << 20


class InOrder:
    """One object, whose bytes come in one stream. Who asks for what has passed by has it begun again."""

    def __init__(self, place: Place, where: str, meta: Any) -> None:
        self.place, self.where = place, where
        self.size: int = meta["size"]
        self._same = meta["size"], meta["e_tag"], meta["last_modified"]
        self.start = b""
        self.tap: Callable[[int, Any], None] | None = None  # told of all that is given out
        self._turn = asyncio.Lock()
        self._stream: Any = None
        self._kept: list[tuple[int, memoryview]] = []  # chunks that lie one behind the other
        self._position = 0  # where the stream is

    @classmethod
    async def open(cls, place: Place, where: str) -> InOrder:
        answer = await cls._begin(place, where)
        require_plain(answer, where)
        opened = cls(place, where, answer.meta)
        opened._stream = answer.stream(min_chunk_size=CHUNK)
        return opened

    @staticmethod
    async def _begin(place: Place, where: str) -> Any:
        try:
            return await library().get_async(place.store, place.path)
        except Exception as error:
            raise translated(error, where) from None

    def ask(self, offset: int, count: int) -> Answer:
        return Answer(transport().submit(self._fetch(offset, offset + count)))

    async def _fetch(self, begin: int, end: int) -> bytearray:
        async with self._turn:
            if self._stream is None or begin < self._first_kept():
                await self._begin_again()
            while self._position < end:
                await self._read_on()
            data = bytearray(end - begin)
            for at, chunk in self._kept:
                low, high = max(begin, at), min(end, at + len(chunk))
                if low < high:
                    data[low - begin : high - begin] = chunk[low - at : high - at]
            if self.tap is not None:
                self.tap(begin, data)
            return data

    def _first_kept(self) -> int:
        return self._kept[0][0] if self._kept else self._position

    async def _begin_again(self) -> None:
        answer = await self._begin(self.place, self.where)
        meta = answer.meta
        if (meta["size"], meta["e_tag"], meta["last_modified"]) != self._same:
            raise located(ReadError(f"{self.where}: the object was changed while it was read"), self.where)
        self._stream, self._position = answer.stream(min_chunk_size=CHUNK), 0
        self._kept.clear()

    async def _read_on(self) -> None:
        try:
            chunk = memoryview(await anext(self._stream))
        except StopAsyncIteration:
            self._stream = None
            raise located(ReadError(f"{self.where}: the answer was cut off"), self.where) from None
        except Exception as error:
            self._stream = None
            raise translated(error, self.where) from None
        self._kept.append((self._position, chunk))
        self._position += len(chunk)
        while self._position - self._kept[0][0] > MOST_KEPT:
            self._kept.pop(0)
