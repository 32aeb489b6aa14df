"""Answers of requests: how the core's threads wait for them, and the rules that each must keep."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from weightload._base.handlers import forgiven, pass_on
from weightload._remote.failures import CHANGED, read_error
from weightload.errors import ReadError

LENGTH_BYTES = 8
MOST_HEADER = 100_000_000  # bytes, of the format; a longer one is refused without its bytes

Lock = threading.Condition  # whose lock is one that its holder may take again


class Tap(Protocol):
    """Is told of what comes."""

    lock: Lock
    """Which ``give`` takes."""
    keeps: bool
    """Whether it keeps what it is given, so that nobody may write there any more."""

    def give(self, begin: int, data: Any) -> None:
        """Where bytes begin, and what they are."""


FIRST_BYTES = 256 << 10  # of the first request: most files' whole header
# A body that ends early, or stands still, is asked for again so often, with a pause that doubles.
ATTEMPTS = 5
FIRST_PAUSE = 0.1  # seconds
SECONDS_BETWEEN_TRIES = 0.001  # to take a lock, which is hardly ever held

Saver = Callable[[int, Any], Awaitable[None]]
"""Takes bytes from an offset on; an answer waits for it, so that what is saved can be slower than what comes."""


class Answer:
    """The answer of a request, which comes later. For the core's threads, see csrc/bindings/remote_source.h.

    No lock is held while Python code runs: a signal's handler may come in between and wait for an answer of its own,
    which the loop, if it wanted that lock, would never bring. So it is not a ``concurrent.futures.Future``.

    Args:
        loop: makes the request; where it is closed, none is made.
        waiting: it is in there until it has come: what a loop that ends has left must be ended with ``leave``.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, request: Coroutine[Any, Any, Any], waiting: set[Answer]
    ) -> None:
        self._loop, self._waiting = loop, waiting
        self._task: asyncio.Task[Any] | None = None
        self._is_unwanted = self._has_come = False
        self._came = threading.Lock()  # free once it has
        self._came.acquire()
        self._result: Any = None
        self.failure: BaseException | None = None
        waiting.add(self)
        try:
            loop.call_soon_threadsafe(self._begin, request)
        except RuntimeError as closed:
            pass_on(closed)
            request.close()
            self.leave()

    def wait(self, seconds: float) -> bool:
        """Whether it has come, or failed."""
        if not self._has_come and self._came.acquire(timeout=seconds):
            self._came.release()
        return self._has_come

    @property
    def was_broken_off(self) -> bool:
        return isinstance(self.failure, asyncio.CancelledError)

    def bytes(self) -> Any:
        """The bytes, once they have come. Raises what the request has raised."""
        if self.was_broken_off:
            raise ReadError("the request was broken off")
        if self.failure is not None:
            try:
                raise self.failure
            finally:
                del self  # the exception's traceback has this frame in it
        return self._result

    def cancel(self) -> None:
        self._is_unwanted = True
        with forgiven(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._break_off)

    def leave(self) -> None:
        """The loop will not bring it any more."""
        self._end(None, asyncio.CancelledError())

    # On the loop.

    def _begin(self, request: Coroutine[Any, Any, Any]) -> None:
        try:
            if self._is_unwanted:
                raise asyncio.CancelledError
            self._task = self._loop.create_task(request)
            self._task.add_done_callback(self._take)
        except BaseException as failed:  # no memory for it, say
            request.close()
            self._end(None, failed)

    def _break_off(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _take(self, task: asyncio.Task[Any]) -> None:
        self._task = None
        if task.cancelled():
            self._end(None, asyncio.CancelledError())
        else:
            failure = task.exception()
            self._end(None if failure is not None else task.result(), failure)

    def _end(self, result: Any, failure: BaseException | None) -> None:
        self._waiting.discard(self)
        self._result, self.failure = result, failure
        self._has_come = True
        with forgiven(RuntimeError):  # it is free: two have left it at once
            self._came.release()


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
    """The result of an attempt; one that is broken off is made again, a few times."""
    for number in range(ATTEMPTS - 1):
        try:
            return await attempt()
        except BrokenOffError:
            await asyncio.sleep(FIRST_PAUSE * 2**number)
    return await attempt()


async def without_waiting(lock: Lock) -> None:
    """Take a lock on the loop, which goes on meanwhile.

    The thread that holds it may be in a signal's handler, and that wait for what the loop brings.
    """
    while not lock.acquire(blocking=False):
        await asyncio.sleep(SECONDS_BETWEEN_TRIES)


async def told(request: Callable[[], Awaitable[Any]], begin: int, tap: Tap | None) -> Any:
    """The bytes of a request, which the tap is told of before anyone has them."""
    data = await request()
    if tap is not None:
        await without_waiting(tap.lock)
        try:
            tap.give(begin, data)
        finally:
            tap.lock.release()
    return data


def identity(meta: Any) -> tuple[object, ...]:
    """The facts that all answers about one object share."""
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
