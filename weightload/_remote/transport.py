"""The thread that speaks to servers: an event loop of its own, on which requests wait for their answers.

Nothing here takes a lock. A signal's handler may come in between any two lines, and load: with threads of its own,
which would wait for a lock that the thread below the handler holds.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from weightload import _C
from weightload._base.handlers import forgiven
from weightload._base.uncopied import Process
from weightload._remote.answers import Answer, InHand, Tap, told
from weightload._remote.loop import CountingLoop
from weightload.errors import WeightLoadError

_Result = TypeVar("_Result")

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_FOR_FUTURES = 10.0  # which take milliseconds where the machine has time for the library's threads
AT_EXIT = "the interpreter is exiting: no load begins any more"


class Transport:
    """An event loop in a thread. Requests are given to it from any thread, and can be broken off at any moment."""

    def __init__(self) -> None:
        self._loop = CountingLoop()
        self._waiting: set[Answer] = set()
        self._stopping = False
        self._process = Process()
        self._ended = threading.Event()
        try:
            threading.Thread(target=self._run, name="weightload-remote", daemon=True).start()
        except BaseException:
            self._loop.close()
            raise

    def submit(self, request: Coroutine[Any, Any, Any]) -> Answer:
        """Send a request; broken off where the interpreter is exiting."""
        return Answer(self._loop, request, self._waiting)

    def close(self) -> None:
        """Break off what is under way, and wait for the thread; the library's are done with Python after it.

        Also where Ctrl-C, or a signal's handler that raises, comes in between: that is raised at the end. In a forked
        child there is nothing of it, and what wakes the loop is shared with the parent.
        """
        if self._process.is_parent():
            return
        came: BaseException | None = None
        while not self._ended.is_set():
            try:
                with forgiven(RuntimeError):  # it is closed meanwhile
                    self._loop.call_soon_threadsafe(self._stop)
                self._ended.wait()
            except BaseException as error:
                came = error
        try:
            if came is not None:
                raise came
        finally:
            came = None  # its traceback has this frame in it

    def _stop(self) -> None:
        if not self._stopping:  # twice would stop the breaking off, too
            self._stopping = True
            self._loop.stop()

    def _run(self) -> None:
        _C.enter_thread_of_loads()
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(_break_off())
            self._loop.run_until_no_futures(SECONDS_FOR_FUTURES)
        finally:
            self._loop.close()  # whoever submits now is told
            for answer in list(self._waiting):  # and whoever did a moment ago
                answer.leave()
            self._ended.set()


async def _break_off() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def finish(request: Coroutine[Any, Any, _Result]) -> _Result:
    """Wait in this thread for what a request brings, or raises; Ctrl-C ends the wait and the request."""
    try:
        here = transport()
    except BaseException:
        request.close()
        raise
    answer = here.submit(request)
    try:
        while not answer.wait(SECONDS_BETWEEN_LOOKS):
            pass
        failed = WeightLoadError(AT_EXIT) if answer.was_broken_off else answer.failure
    except BaseException:
        answer.cancel()
        raise
    if failed is not None:
        raise bare(failed)
    result: _Result = answer.bytes()
    return result


def asked(
    fetch: Callable[[int, int], Coroutine[Any, Any, Any]], start: memoryview, offset: int, count: int, tap: Tap | None
) -> Answer | InHand:
    """A range of an object, of which ``start`` is at hand. The tap is told of them before anyone has them."""
    if offset + count <= len(start):
        data = start[offset : offset + count]
        if tap is not None:
            tap.give(offset, data)
        return InHand(data)
    return transport().submit(told(lambda: fetch(offset, offset + count), offset, tap))


def bare(error: BaseException) -> BaseException:
    """Without the frames of the loop's thread, and without the library's exception, which has the whole address."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


class _Own:
    """The state of this process."""

    def __init__(self) -> None:
        self.is_over = False  # the interpreter is exiting
        self.published: dict[str, Transport] = {}  # one at most
        self.process = Process()

    @property
    def transport(self) -> Transport | None:
        return self.published.get("it")


_own = _Own()


def transport() -> Transport:
    """The process's, begun when it is first needed.

    Raises:
        WeightLoadError: this process was forked of one that has spoken to servers: the library's threads, and the
            locks that they held, are in the parent only. Or the interpreter is exiting.
    """
    if _own.process.is_parent():
        if _own.transport is not None:
            raise WeightLoadError(
                "this process was forked of one that has loaded from servers, and cannot: start it another way (spawn)"
            )
        _own.__init__()  # type: ignore[misc]
    known = _own.transport
    if known is None and not _own.is_over:
        begun = Transport()
        known = _own.published.setdefault("it", begun)  # another thread, or a signal's handler, may have been first
        if known is begun:
            atexit.register(begun.close)
        else:
            begun.close()
    if known is None or _own.is_over:
        if known is not None:
            known.close()  # which the exit may have missed
        raise WeightLoadError(AT_EXIT)
    return known


def leave_interpreter() -> None:
    """Let nothing begin from now on: for the exit hook, behind which nobody would close it."""
    _own.is_over = True
    if _own.transport is not None:
        _own.transport.close()
