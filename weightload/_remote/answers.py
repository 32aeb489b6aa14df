"""What a request brings: as the core's threads wait for it, and what must be so of every answer."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable
from typing import Any

from weightload._base.handlers import pass_on
from weightload._remote.failures import CHANGED, read_error
from weightload.errors import ReadError

LENGTH_BYTES = 8
MOST_HEADER = 100_000_000  # bytes, of the format; a longer one is refused without its bytes
Tap = Callable[[int, Any], None]
"""Is told where bytes begin, and what they are."""

FIRST_BYTES = 256 << 10  # of the first request: most files' whole header
# A body that ends early, or stands still, is asked for again so often, with a pause that doubles.
ATTEMPTS = 5
FIRST_PAUSE = 0.1  # seconds


Saver = Callable[[int, Any], Awaitable[None]]
"""Takes bytes from an offset on; an answer waits for it, so that what is saved can be slower than what comes."""


class Answer:
    """What a request will bring. For the core's threads, see csrc/bindings/remote_source.h."""

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self._future = future

    def wait(self, seconds: float) -> bool:
        """Whether it has come, or failed."""
        if not self._future.done():
            try:
                self._future.exception(seconds)
            except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError) as not_yet:
                pass_on(not_yet)
        return self._future.done()

    def bytes(self) -> Any:
        try:
            return self._future.result()
        except concurrent.futures.CancelledError as cancelled:
            pass_on(cancelled)
            raise ReadError("the request was broken off") from None

    def cancel(self) -> None:
        self._future.cancel()


class InHand:
    """An answer that needs no request."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def wait(self, seconds: float) -> bool:
        return True

    def bytes(self) -> Any:
        return self._data

    def cancel(self) -> None:
        pass


class BrokenOffError(ReadError):
    """A body has ended too early, or failed: another try may bring it."""


def header_end(start: memoryview, size: int) -> int:
    """Where the header of an object ends that starts so; 0 if it is of no size that the format allows."""
    end = LENGTH_BYTES + int.from_bytes(start[:LENGTH_BYTES], "little")
    return end if end <= min(size, MOST_HEADER + LENGTH_BYTES) else 0


def broken_off(where: str, what: str) -> BrokenOffError:
    error = BrokenOffError(f"{where}: {what}")
    error.filename = where
    return error


async def tried_again(attempt: Callable[[], Awaitable[Any]]) -> Any:
    """What an attempt brings; one that is broken off is made again, a few times."""
    for number in range(ATTEMPTS - 1):
        try:
            return await attempt()
        except BrokenOffError:
            await asyncio.sleep(FIRST_PAUSE * 2**number)
    return await attempt()


async def told(request: Callable[[], Awaitable[Any]], begin: int, tap: Tap | None) -> Any:
    """What a request brings, which the tap is told of before anyone has it."""
    data = await request()
    if tap is not None:
        tap(begin, data)
    return data


def identity(meta: Any) -> tuple[object, ...]:
    """What is the same of all answers about one object."""
    return meta["size"], meta["e_tag"], meta["last_modified"]


def require_same(answer: Any, same: tuple[object, ...], where: str) -> None:
    """Refuse an answer about another object than the one with this ``identity``."""
    if identity(answer.meta) != same:
        raise read_error(where, CHANGED)


def require_plain(answer: Any, where: str) -> None:
    """Refuse what the server has packed on the way: its ranges are not those of the file."""
    packed = dict(answer.attributes).get("Content-Encoding")
    if packed and packed != "identity":
        what = f"the server packs it on the way (Content-Encoding: {packed}), so no range of it can be read"
        raise read_error(where, what)
