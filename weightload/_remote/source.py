"""Opens what servers have as checkpoint files: the first request brings a header, and each further one a range."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from weightload import _C
from weightload._base.addresses import shown
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
from weightload._remote.direct import Direct, Request
from weightload._remote.failures import ANOTHER_RANGE, CUT_OFF, may_pass, read_error, reason_of, status_of, translated
from weightload._remote.in_order import InOrder
from weightload._remote.stores import Place, library, open_address, patience, place_of
from weightload._remote.transport import asked, bare, finish

OPENED_AT_ONCE = 32


class RemoteObject:
    """One object of a server's, as it was when it was opened: its size and its tag are compared with every answer's."""

    def __init__(self, place: Place, where: str, meta: Any, start: Any) -> None:
        self.place, self.where = place, where
        self.size: int = meta["size"]
        self._tag, self.same = meta["e_tag"], identity(meta)
        self.start = memoryview(start)
        self._direct: Direct | None = None
        self.tap: Tap | None = None  # told of all that a load is given
        self.saver: Saver | None = None  # told of all that comes

    def ask(self, offset: int, count: int, tapped: bool = True) -> Answer | InHand:
        return asked(self.fetch, self.start, offset, count, self.tap if tapped else None)

    def begin_direct(self, offset: int, count: int) -> Request | None:
        """A request whose body the core's threads take from its connection; None where they have to ask."""
        is_kept = self.saver is not None or (self.tap is not None and self.tap.keeps)
        if self._direct is None or is_kept or offset + count <= len(self.start):
            return None
        return self._direct.begin(offset, offset + count, self.tap)

    async def prepare(self) -> None:
        """Find out whether there can be direct requests."""
        address = await open_address(self.place)
        if address:
            self._direct = Direct.of(address, self.place.headers, self.same, patience())

    async def fetch(self, begin: int, end: int) -> Any:
        """The bytes of a range, as a buffer.

        Raises:
            ReadError, OSError: as ``translated``, and for an object that is another one now.
        """
        data = await tried_again(lambda: self._fetch(begin, end))
        if self.saver is not None:
            await self.saver(begin, data)
        return data

    async def _fetch(self, begin: int, end: int) -> Any:
        try:
            answer = await library().get_async(self.place.store, self.place.path, options=self._options(begin, end))
        except Exception as error:  # which the library has tried again by itself, for a second or two
            if may_pass(error):
                raise broken_off(self.where, reason_of(error)) from None
            raise translated(error, self.where) from None
        require_plain(answer, self.where)
        require_same(answer, self.same, self.where)
        if tuple(answer.range) != (begin, end):
            raise read_error(self.where, ANOTHER_RANGE)
        return await body_of(answer, end - begin, self.where)

    def _options(self, begin: int, end: int) -> dict[str, Any]:
        options: dict[str, Any] = {"range": (begin, end)}
        if self._tag and not self._tag.startswith("W/"):  # a weak tag never matches
            options["if_match"] = self._tag
        return options


async def body_of(answer: Any, count: int, where: str) -> Any:
    """Return the answer's bytes, of which there must be ``count``."""
    try:
        data = await answer.bytes_async()
    except Exception as error:
        raise broken_off(where, reason_of(error)) from None
    if len(data) != count:
        raise broken_off(where, CUT_OFF)
    return data


async def _open(address: str) -> RemoteObject | InOrder:
    """The object, with its header in hand if that is of a size that the format allows."""
    where = shown(address)
    place = place_of(address)

    async def first() -> tuple[Any, Any]:
        answer = await library().get_async(place.store, place.path, options={"range": (0, FIRST_BYTES)})
        require_plain(answer, where)
        return answer.meta, await body_of(answer, min(FIRST_BYTES, answer.meta["size"]), where)

    try:
        meta, data = await tried_again(first)
    except Exception as error:
        if type(error).__name__ == "NotSupportedError":
            return await InOrder.open(place, where)
        if status_of(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # there are no bytes in it
            return await _open_empty(place, where)
        raise translated(error, where) from None
    opened = RemoteObject(place, where, meta, data)
    length = header_end(opened.start, opened.size)
    if len(data) < length:
        rest = await opened.fetch(len(data), length)
        opened.start = memoryview(b"".join((opened.start, memoryview(rest))))
    await opened.prepare()
    return opened


async def _open_empty(place: Place, where: str) -> RemoteObject:
    try:
        meta = await library().head_async(place.store, place.path)
    except Exception as error:
        raise translated(error, where) from None
    if meta["size"] != 0:
        raise read_error(where, f"the server gives none of its {meta['size']} bytes")
    return RemoteObject(place, where, meta, b"")


Source = RemoteObject | InOrder


def open_addresses(
    addresses: Sequence[str], begin: Callable[[str, Source], object] | None = None
) -> list[_C.CheckpointFile]:
    """Open what servers have, and validate the headers; several at once.

    ``begin`` is called of each address with what it is read by, before anything is read beyond its ``start``.

    Raises:
        FileNotFoundError, PermissionError, ReadError, HeaderError: of the first that fails.
        ModuleNotFoundError, WeightLoadError: as ``stores.place_of``.
    """
    if not addresses:
        return []
    library()

    async def open_all() -> list[Any]:
        few = asyncio.Semaphore(OPENED_AT_ONCE)

        async def one(address: str) -> RemoteObject | InOrder:
            async with few:
                return await _open(address)

        return await asyncio.gather(*map(one, addresses), return_exceptions=True)

    files: list[_C.CheckpointFile] = []
    for address, one in zip(addresses, finish(open_all()), strict=True):
        if isinstance(one, BaseException):
            files.clear()
            raise bare(one)
        if begin is not None:
            begin(address, one)
        files.append(_C.open_source(one, one.where, one.size))
    return files


__all__ = ["RemoteObject", "Source", "open_addresses"]
