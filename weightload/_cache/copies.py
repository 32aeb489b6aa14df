"""Copies of what servers have, written while a load reads it: each appears under its name once it is whole."""

from __future__ import annotations

import asyncio
import atexit
import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from weightload._base.handlers import forgiven, pass_on
from weightload._base.uncopied import Process
from weightload._remote.answers import without_waiting
from weightload._remote.transport import SECONDS_BETWEEN_LOOKS
from weightload.errors import CacheError, ReadError, WeightLoadError, located

# Bytes that wait to be written. With more, answers are held back until the disk has caught up.
MOST_WAITING = 256 << 20
# Bytes that a load does not ask for are asked for at its end, if they are no more than this part of a file.
MOST_LEFT_OUT = 1 / 8
PIECE = 8 << 20  # bytes of such a request
BEHIND_A_READER = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Ranges:
    """Half-open ranges of bytes, none of which touches another."""

    def __init__(self, ranges: Sequence[Sequence[int]] = ()) -> None:
        self.all: list[tuple[int, int]] = []
        for begin, end in ranges:
            self.add(begin, end)

    def add(self, begin: int, end: int) -> None:
        """Add a range, which may touch others or overlap them."""
        apart = [one for one in self.all if one[1] < begin or end < one[0]]
        near = [one for one in self.all if one[1] >= begin and end >= one[0]]
        self.all = sorted([*apart, (min([begin, *(low for low, _ in near)]), max([end, *(high for _, high in near)]))])

    def missing(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The parts of a range that are in none of them."""
        found = []
        for low, high in self.all:
            if high <= begin:
                continue
            if low >= end:
                break
            if low > begin:
                found.append((begin, low))
            begin = high
        return [*found, (begin, end)] if begin < end else found


class Rank(NamedTuple):
    """One of several that write the copies of a load together."""

    number: int
    of: int
    token: str
    """In the names of the files that they write to."""


class Copy:
    """A file that is being written. Nobody sees it under its name, ``path``, before all of its bytes are in it.

    Who writes has a shared lock (``flock``) on the file, which goes with its process, so that what dead processes have
    left is known by a lock that can be had.
    """

    def __init__(self, path: str, part: str, where: str, source: Any, rank: Rank | None) -> None:
        self.path, self.where, self.source = path, where, source
        self.size: int = source.size
        self._part, self._rank = part, rank
        self._have = Ranges()
        self._descriptor: int | None = None
        self._unlink = rank is None
        with self.told():
            self._descriptor = self._open()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | BEHIND_A_READER | (os.O_EXCL if self._rank is None else 0)
        while True:
            descriptor = os.open(self._part, flags, 0o666)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                except OSError as failed:  # a file system without locks: nothing is swept there
                    pass_on(failed)
                    if self._rank is not None:
                        raise
                if is_at(self._part, descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # it was swept before there was a lock on it

    @contextlib.contextmanager
    def told(self, offset: int | None = None) -> Any:
        """The system's errors are told as ``CacheError``."""
        try:
            yield
        except OSError as failed:
            pass_on(failed)
            if isinstance(failed, ReadError):
                raise
            number, reason = failed.errno, failed.strerror
        else:
            return
        what = f"{self.path}: cache= cannot keep {self.where} there: {reason}"
        error = located(CacheError(what), self.path)
        error.errno, error.offset = number, offset
        raise error

    @property
    def is_whole(self) -> bool:
        """Whether this process has written all of it."""
        return not self._have.missing(0, self.size)

    def write(self, begin: int, data: memoryview) -> None:
        """Bytes from an offset on; those that are there already are not written again."""
        if self._descriptor is None:
            return
        for low, high in self._have.missing(begin, begin + len(data)):
            at = low
            while at < high:
                with self.told(at):
                    at += os.pwrite(self._descriptor, data[at - begin : high - begin], at)
            self._have.add(low, high)

    def left_out(self) -> list[tuple[int, int]] | None:
        """The ranges to ask for so that it is whole; None if that is too much."""
        return worth_asking(self._have, self.size)

    def report(self) -> Ranges | None:
        """Tell the other ranks what this one has written; the last one that tells gets what all have.

        None: it is not the last, or the ranks have had different states of the object. A rank writes nothing after it.
        It stands behind the file's last byte, and is cut off before anybody else reads.
        """
        rank, descriptor = self._rank, self._descriptor
        assert rank is not None
        assert descriptor is not None
        name = os.path.basename(os.path.dirname(self.path))
        line = json.dumps([rank.number, name, self._have.all]).encode() + b"\n"
        with self.told(self.size):
            os.fdatasync(descriptor)
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            try:
                at = max(self.size, os.fstat(descriptor).st_size)
                if os.pwrite(descriptor, line, at) != len(line):
                    return None
                told = os.pread(descriptor, at + len(line) - self.size, self.size)
            finally:
                fcntl.lockf(descriptor, fcntl.LOCK_UN)
        reports = {number: (name, ranges) for number, name, ranges in map(json.loads, told.splitlines())}
        # The object may have changed between the openings of two ranks, who then have bytes of two of its states.
        if len(reports) < rank.of or any(other != name for other, _ in reports.values()):
            return None
        self._have = Ranges([one for _, ranges in reports.values() for one in ranges])
        return self._have

    def seal(self) -> None:
        """Give it its name. What the folder has of other states of the object goes."""
        if self._descriptor is None:
            return
        with self.told():
            os.ftruncate(self._descriptor, self.size)
            os.fsync(self._descriptor)
            folder = os.path.dirname(self.path)
            with forgiven(FileExistsError):
                os.mkdir(folder)
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
            os.replace(self._part, self.path)
        self.let_go()
        remove_others(folder)

    def drop(self) -> None:
        """Leave nothing of it, unless other ranks are still at it."""
        if self._descriptor is None:
            return
        with forgiven(OSError):
            if self._rank is not None:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(self._part, self._descriptor):
                os.unlink(self._part)
        self.let_go()

    def let_go(self) -> None:
        """This process has no more to do with it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with forgiven(OSError):  # of network file systems; by then fsync has said the same
                os.close(descriptor)


def worth_asking(have: Ranges, size: int) -> list[tuple[int, int]] | None:
    """The ranges of a file that are missing; None if they are too much to ask for only for a copy."""
    gaps = have.missing(0, size)
    return gaps if sum(end - begin for begin, end in gaps) <= size * MOST_LEFT_OUT else None


def is_at(path: str, descriptor: int) -> bool:
    """Whether a name is that of an open file."""
    try:
        there, here = os.lstat(path), os.fstat(descriptor)
    except FileNotFoundError as missing:
        pass_on(missing)
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def remove_others(folder: str) -> None:
    """Remove copies of other states of an object: folders beside with the same first part of their name."""
    above, name = os.path.split(folder)
    with forgiven(OSError):
        for other in os.listdir(above):
            if other != name and other.partition(".")[0] == name.partition(".")[0]:
                shutil.rmtree(os.path.join(above, other), ignore_errors=True)  # which follows no links


def sweep(path: str) -> None:
    """Remove what a process that is gone was writing."""
    with forgiven(OSError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return
        descriptor = os.open(path, os.O_RDWR | BEHIND_A_READER)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(path, descriptor):
                os.unlink(path)
        finally:
            os.close(descriptor)


class Worker:
    """A thread that does what it is given, in order, until something fails."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.lock = self._changed = threading.Condition()  # guards all below
        self._work: collections.deque[tuple[Callable[[], None], int]] = collections.deque()
        self._rooms: list[concurrent.futures.Future[None]] = []
        self._waiting = 0  # bytes
        self._busy = self._stopped = False
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self.failure: BaseException | None = None

    def submit(self, work: Callable[[], None], size: int = 0) -> concurrent.futures.Future[None] | None:
        """Queue work. Return a future to wait for before more is given if too many bytes wait already; else None.

        Raises:
            What has failed before.
        """
        with self._changed:
            if self.failure is not None:
                raise self.failure.with_traceback(None)
            if self._stopped:
                return None
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread
            self._work.append((work, size))
            self._waiting += size
            self._changed.notify_all()
            if self._waiting <= MOST_WAITING:
                return None
            self._rooms.append(concurrent.futures.Future())
            return self._rooms[-1]

    def drain(self) -> None:
        """Wait until all is done.

        Raises:
            What has failed.
        """
        with self._changed:
            while (self._work or self._busy) and not self._stopped:
                self._changed.wait(SECONDS_BETWEEN_LOOKS)
            if self.failure is not None:
                raise self.failure.with_traceback(None)

    def close(self) -> None:
        """Drop what is not begun, and wait for the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is None or self._thread is threading.current_thread():
            return
        # Do not use Thread.join: when a signal's exception breaks it off, it takes the thread for ended.
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            pass

    def _run(self) -> None:
        try:
            while self._do_next():
                pass
        finally:
            with self._changed:
                self._stopped = True
                self._work.clear()
                self._make_room()
                self._changed.notify_all()
            self._ended.set()

    def _do_next(self) -> bool:
        with self._changed:
            while not self._work and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return False
            work, size = self._work.popleft()
            self._busy = True
        failure: BaseException | None = None
        try:
            work()
        except BaseException as error:  # for the consumer
            failure = error.with_traceback(None)
        with self._changed:
            self._busy = False
            self._waiting -= size
            self.failure, self._stopped = failure, self._stopped or failure is not None
            if self._waiting <= MOST_WAITING:
                self._make_room()
            self._changed.notify_all()
        return failure is None

    def _make_room(self) -> None:
        for room in self._rooms:
            if room.set_running_or_notify_cancel():
                room.set_result(None)
        self._rooms.clear()


_under_way: set[Copies] = set()


@atexit.register
def _leave_interpreter() -> None:
    """Later there are no threads of Python's that could end."""
    for one in list(_under_way):
        one.close()


class Copies:
    """The copies that a load makes. One thread writes, another waits for the disk and gives whole files their names.

    Args:
        at_end: whether no file gets its name before ``finish``, since its bytes may still prove wrong.
        rank: whose part of the copies this process writes; None if all.
    """

    def __init__(self, at_end: bool, rank: Rank | None) -> None:
        self._at_end, self.rank = at_end or rank is not None, rank
        self._copies: list[Copy] = []
        self._writer, self._sealer = Worker("weightload-cache"), Worker("weightload-sync")
        self._lock = threading.Lock()  # of finish
        self._finished = False
        self._process = Process()

    @property
    def failure(self) -> BaseException | None:
        """The first failure of the threads."""
        return self._writer.failure or self._sealer.failure

    def add(self, copy: Copy) -> None:
        """From now on all that its source gives is written."""
        _under_way.add(self)
        self._copies.append(copy)
        copy.source.saver = partial(self._take, copy)
        self._submit(copy, 0, copy.source.start)

    def skip(self, source: Any) -> None:
        """Make no copy of this one."""
        for copy in [copy for copy in self._copies if copy.source is source]:
            source.saver = None
            self._copies.remove(copy)
            self._writer.submit(copy.drop)

    async def _take(self, copy: Copy, begin: int, data: Any) -> None:
        await without_waiting(self._writer.lock)
        try:
            room = self._submit(copy, begin, data)
        finally:
            self._writer.lock.release()
        if room is not None:
            await asyncio.wrap_future(room)

    def _submit(self, copy: Copy, begin: int, data: Any) -> concurrent.futures.Future[None] | None:
        bytes_ = memoryview(data)
        return self._writer.submit(lambda: self._write(copy, begin, bytes_), len(bytes_))

    def _write(self, copy: Copy, begin: int, data: memoryview) -> None:
        if copy.is_whole:
            return
        copy.write(begin, data)
        if copy.is_whole and not self._at_end:
            self._seal(copy)

    def _seal(self, copy: Copy) -> None:
        self._sealer.submit(copy.seal)

    def finish(self) -> None:
        """Ask for the little that the load has left out, and wait until all is written.

        Raises:
            CacheError: it cannot be written. ReadError: a server has failed.
        """
        if self._process.is_parent():
            raise WeightLoadError(
                "this load was begun before fork(): the threads that write its copies are the parent's"
            )
        with self._lock:
            if self._finished:
                return
            self._writer.drain()
            mine = []
            for copy in self._copies:
                if self.rank is None:
                    gaps = copy.left_out()
                else:
                    have = copy.report()
                    if have is None:
                        continue  # another rank is the last one
                    gaps = worth_asking(have, copy.size)
                mine.append(copy)
                self._complete(copy, gaps or [])
            self._writer.drain()
            for copy in mine:
                if copy.is_whole:
                    self._seal(copy)  # which does nothing where it is done
            self._sealer.drain()
            self._finished = True
        self.close()

    def _complete(self, copy: Copy, gaps: list[tuple[int, int]]) -> None:
        for begin, end in gaps:
            for at in range(begin, end, PIECE):
                answer = copy.source.ask(at, min(PIECE, end - at))
                try:
                    while not answer.wait(SECONDS_BETWEEN_LOOKS):
                        pass
                    answer.bytes()  # which has gone to the writer by then
                except BaseException:
                    answer.cancel()
                    raise

    def close(self) -> None:
        """Stop; what is not whole goes. In a forked child, which has none of the threads, it is the parent's."""
        if self._process.is_parent():
            for copy in self._copies:
                copy.let_go()
            return
        self._writer.close()
        self._sealer.close()
        for copy in self._copies:
            copy.source.saver = None
            copy.drop()
        self._copies.clear()
        _under_way.discard(self)
