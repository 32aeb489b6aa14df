"""The answers of a server that a load was given, kept until they are hashed."""

from __future__ import annotations

import bisect
import hashlib
import threading
from typing import Any

from weightload._remote.failures import read_error

DIFFERENT = "the server has given two different answers for the same bytes"


class Budget:
    """Bytes that the taps of a load may hold together.

    Attributes:
        lock: of all that they keep; is told when more has come.
    """

    MOST = 512 << 20

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self._held = 0

    def take(self, count: int) -> bool:
        """Take room for ``count`` more bytes, if there is any, and say so. Call it with the lock held."""
        if self._held + count > self.MOST:
            return False
        self._held += count
        return True

    def give_back(self, count: int) -> None:
        """With the lock held."""
        self._held -= count


class Reading:
    """Answers that have no bytes in common, to be taken once, in order.

    Of what there is no room for the digest is kept: it is asked for again in the end, and must be the same.
    """

    def __init__(self, start: memoryview, budget: Budget) -> None:
        self._budget, self._arrived = budget, budget.lock  # which guards all below
        self._begins: list[int] = []
        self._ends: dict[int, int] = {}
        self._held: dict[int, memoryview] = {}
        self._dropped: dict[int, bytes] = {}
        self._passing: int | None = None  # the one that was taken from last
        if len(start):
            with self._arrived:
                self.put(0, start)

    def put(self, begin: int, data: memoryview) -> bool:
        """Whether it belongs here: it does not where a byte of it has been given before. With the lock held."""
        at = bisect.bisect_right(self._begins, begin)
        end = begin + len(data)
        if at and self._ends[self._begins[at - 1]] > begin:
            return False
        if at < len(self._begins) and self._begins[at] < end:
            return False
        self._begins.insert(at, begin)
        self._ends[begin] = end
        if self._budget.take(len(data)):
            self._held[begin] = data
        else:
            self._dropped[begin] = hashlib.sha256(data).digest()
        return True

    def wait(self) -> None:
        """Until more has come, or for a moment."""
        with self._arrived:
            self._arrived.wait(0.1)

    def take(self, at: int) -> memoryview | None:
        """Bytes from there on, if there are some; what is before is kept no longer."""
        with self._arrived:
            if self._passing is not None and self._ends[self._passing] <= at:
                self._let_go(self._passing)
                self._passing = None
            begin = self._around(at)
            if begin is None or begin not in self._held:
                return None
            self._passing = begin
            return self._held[begin][at - begin :]

    def gap(self, at: int, end: int) -> tuple[int, int, bytes | None]:
        """A range around an offset that is not here: one that was not kept, with its digest, or up to what is known."""
        with self._arrived:
            begin = self._around(at)
            if begin is not None:
                return begin, self._ends[begin], self._dropped[begin]
            later = bisect.bisect_right(self._begins, at)
            return at, min([end, *self._begins[later : later + 1]]), None

    def close(self) -> None:
        """Nothing is to be kept any more. With the lock held."""
        for begin in list(self._held):
            self._let_go(begin)

    def _around(self, at: int) -> int | None:
        """The answer that has this byte, by its begin."""
        number = bisect.bisect_right(self._begins, at) - 1
        if number < 0 or self._ends[self._begins[number]] <= at:
            return None
        return self._begins[number]

    def _let_go(self, begin: int) -> None:
        data = self._held.pop(begin, None)
        if data is not None:
            self._budget.give_back(len(data))


class Tap:
    """All that a load has been given of an object. Each byte of it is in one of ``readings``.

    There is one, unless the load asks for the same bytes twice: hashing one answer says nothing of the other. What the
    object's beginning has, which was read when it was opened, is compared at once.

    Attributes:
        used: whether it was given anything but the header.
        lock: of all that the taps of a load keep.
    """

    keeps = True

    def __init__(self, source: Any, header_bytes: int, budget: Budget) -> None:
        self._source, self._budget, self._header_bytes = source, budget, header_bytes
        self.lock = budget.lock
        self._start = memoryview(source.start)
        self._open = True
        self.used = False
        self.readings = [Reading(self._start, budget)]
        source.tap = self

    def give(self, begin: int, data: Any) -> None:
        """Keep what the server has answered; called by the thread that received it.

        Raises:
            ReadError: it is not what the object begins with.
        """
        with self.lock:
            if not self._open or not len(data):
                return
            self.used = self.used or begin + len(data) > self._header_bytes
            begin, data = behind_start(self._source, self._start, begin, memoryview(data))
            if not len(data):
                return
            if not any(reading.put(begin, data) for reading in self.readings):
                self.readings.append(Reading(self._start, self._budget))
                self.readings[-1].put(begin, data)
            self.lock.notify_all()

    def close(self) -> None:
        """Nothing is to be kept any more."""
        with self.lock:
            self._open = False
            self._source.tap = None
            for reading in self.readings:
                reading.close()


def behind_start(source: Any, start: memoryview, begin: int, data: memoryview) -> tuple[int, memoryview]:
    """The part of an answer behind the object's beginning, which was read when it was opened.

    Raises:
        ReadError: it is not what the object begins with.
    """
    known = start[begin : begin + len(data)]
    if bytes(known) != bytes(data[: len(known)]):
        raise read_error(source.where, f"{DIFFERENT}, from {begin} on")
    return begin + len(known), data[len(known) :]


__all__ = ["DIFFERENT", "Budget", "Reading", "Tap", "behind_start"]
