"""Threads that hash files, and what a load was given of them."""

from __future__ import annotations

import functools
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from weightload import _C
from weightload._base.cpus import usable_cpus
from weightload._base.handlers import forgiven, pass_on
from weightload._base.printable import printable
from weightload._base.uncopied import Process
from weightload._verify import hashes
from weightload._verify.crc_tap import CrcReading, CrcTap, FileTap
from weightload._verify.digests import KINDS, SHA256
from weightload._verify.tap import DIFFERENT, Budget, Reading, Tap
from weightload.errors import ChecksumError, WeightLoadError, located

PIECE = 8 << 20  # bytes that are read and hashed at a time
PART = 64 << 20  # of a local file, which a thread hashes where the digest can be made of those of parts
CACHED_PIECE = 1 << 20  # of a part: what was copied is in the processor's cache when it is hashed


class Work(NamedTuple):
    """A file that is to be checked."""

    file: _C.CheckpointFile
    expected: str
    tap: Tap | CrcTap | FileTap | None
    mine: bool
    """Whether this process checks it in any case. If not, another does; what a server has this one checks, too, if it
    was given any of it: nobody else has these bytes."""


class Parts:
    """A local file whose CRC is made of those of its parts, which are hashed in any order, or have been already.

    Args:
        file: is read, but for what is known of it.
        expected: its digest.
        known: ranges of all of it, in order, and their CRCs; None is to be found.
        require_wanted: raises where nobody wants the verdict any more.
    """

    def __init__(
        self,
        file: _C.CheckpointFile,
        expected: str,
        known: Iterable[tuple[int, int, hashes.Crc | None]],
        require_wanted: Callable[[], None],
    ) -> None:
        self._file, self._expected, self._require_wanted = file, expected, require_wanted
        self._lock = threading.Lock()
        self._hashed: dict[int, hashes.Crc] = {}
        self._left: dict[int, int] = {}  # the end of each, by its begin
        for begin, end, crc in known:
            if crc is not None:
                self._hashed[begin] = crc
            else:
                self._left.update((at, min(at + PART, end)) for at in range(begin, end, PART))

    def jobs(self) -> list[Callable[[], None]]:
        """Return the jobs to be done; the last to end has the verdict. They are not kept here: each has this object."""
        return [functools.partial(self._hash, *part) for part in self._left.items()] or [self._conclude]

    def _hash(self, begin: int, end: int) -> None:
        crc = hashes.Crc(kind_of(self._expected))
        memory = bytearray(min(CACHED_PIECE, end - begin))
        for at in range(begin, end, CACHED_PIECE):
            self._require_wanted()
            piece = memoryview(memory)[: min(CACHED_PIECE, end - at)]
            self._file.read_into(at, piece)
            crc.update(piece)
        with self._lock:
            self._hashed[begin] = crc
            del self._left[begin]
            if self._left:
                return
        self._conclude()

    def _conclude(self) -> None:
        whole = hashes.Crc(kind_of(self._expected))
        for at in sorted(self._hashed):
            whole.append(self._hashed[at])
        _require_equal(self._file, whole.hexdigest(), self._expected)


class Checker:
    """Threads that hash files, of which a load reads tensors at the same time: one a file, as many as there are CPUs.

    They read by the descriptor that the load reads by, through the page cache. What a server has they take from what
    the load asks for; the rest they ask for themselves, when the load is over. Where a digest can be made of those of
    parts, the load's own threads hash what they read of a local file, and the rest is read when the load is over; of a
    file that is mapped it is all of it, by several threads, from the beginning on.

    Args:
        files, expected, mine: each with its digest, and as ``Work.mine``.
        alone: the load is no other rank's, too.
    """

    def __init__(
        self, files: Sequence[_C.CheckpointFile], expected: Sequence[str], mine: Sequence[bool], alone: bool
    ) -> None:
        # No lock of Python's here, nor an Event, which has one: a signal's handler may close the load while the thread
        # that it stops is in any of these lines.
        self._work: list[Callable[[], None]] = []  # from the last on
        self._running: set[object] = set()  # a token a thread
        self._claims: dict[object, str] = {}  # by token: whether its thread runs, or must not
        self._woken = threading.Lock()  # free when a thread has ended since
        self._woken.acquire()
        self._process = Process()
        self._turn = threading.RLock()  # whose turn it is to finish: threads may share an iterator
        self._stopped = self._over = False
        self._failures: list[BaseException] = []
        self._all: list[Work] = []
        self._files: list[_C.CheckpointFile] = []
        try:
            self._tap_all(files, expected, mine, alone)
            self._start([job for work in self._all if work.mine for job in self._first_jobs(work)])
        except BaseException:
            self.close()
            raise

    def _tap_all(
        self, files: Sequence[_C.CheckpointFile], expected: Sequence[str], mine: Sequence[bool], alone: bool
    ) -> None:
        budget = Budget()
        instead: dict[int, _C.CheckpointFile] = {}
        for file, right, whose in zip(files, expected, mine, strict=True):
            if id(file) not in instead:
                tap = self._tap(file, right, budget, alone)
                self._all.append(Work(file, right, tap, whose))
                if file.is_remote:
                    instead[id(file)] = file
                else:
                    instead[id(file)] = file.with_tap(tap) if tap is not None else file.also_read_by_others()
            self._files.append(instead[id(file)])

    def take_files(self) -> list[_C.CheckpointFile]:
        """Return the files that are to be loaded in place of the given ones; to be called once."""
        files, self._files = self._files, []
        return files

    def _tap(
        self, file: _C.CheckpointFile, expected: str, budget: Budget, alone: bool
    ) -> Tap | CrcTap | FileTap | None:
        kind = kind_of(expected)
        if not file.is_remote:
            return FileTap(kind, weakref.ref(self)) if kind != SHA256 and alone else None
        if kind == SHA256:
            return Tap(file.remote, file.data_begin, budget)
        return CrcTap(file.remote, file.data_begin, kind)

    def read_what_was_left(self, tap: FileTap) -> None:
        """Begin to read a file that the load does not read."""
        self._start([job for work in self._all if work.tap is tap for job in self._parts(work)])

    def _parts(self, work: Work, reading: CrcReading | None = None) -> list[Callable[[], None]]:
        size = work.file.size
        known = reading.in_order(size) if reading is not None else [(0, size, None)]
        return Parts(work.file, work.expected, known, self._require_wanted).jobs()

    def _first_jobs(self, work: Work) -> list[Callable[[], None]]:
        """The jobs of a file that begin with the load."""
        if isinstance(work.tap, CrcTap | FileTap):
            return []  # when the load is over
        if work.tap is not None:
            return [functools.partial(self._check, work, work.tap.readings[0])]
        if kind_of(work.expected) == SHA256:
            return [functools.partial(self._check, work, None)]
        return self._parts(work)

    def _last_jobs(self, work: Work) -> list[Callable[[], None]]:
        """The jobs of a file that begin when the load is over."""
        if isinstance(work.tap, CrcTap):
            readings = work.tap.readings if work.mine or work.tap.used else []
            return [functools.partial(self._combine, work, reading) for reading in readings]
        if isinstance(work.tap, FileTap):
            if work.tap.is_left:
                return []
            return [job for reading in work.tap.readings for job in self._parts(work, reading)]
        if work.tap is None or not work.tap.used:
            return []
        return [functools.partial(self._check, work, reading) for reading in work.tap.readings[1 if work.mine else 0 :]]

    def _start(self, work: list[Callable[[], None]]) -> None:
        """Have these jobs done, too. Where no thread can be started, the caller that waits for them does them."""
        self._work[:0] = work[::-1]
        for _ in range(min(len(work), usable_cpus() - len(self._running))):
            token = object()
            try:
                self._running.add(token)
                run = functools.partial(self._run_thread, token)
                threading.Thread(target=run, name="weightload-verify", daemon=True).start()
            except BaseException as failed:
                # A handler has raised in start(), perhaps, and the thread runs.
                if self._claims.setdefault(token, "withdrawn") == "withdrawn":
                    self._running.discard(token)
                if not isinstance(failed, RuntimeError):
                    raise
                pass_on(failed)
                break  # there are none left

    def _run_thread(self, token: object) -> None:
        _C.enter_thread_of_loads()
        if self._claims.setdefault(token, "running") == "running":
            self._run()
            self._running.discard(token)
            with forgiven(RuntimeError):  # another has just done so
                self._woken.release()

    def finish(self, look: Callable[[], None] = lambda: None) -> None:
        """Wait until all is hashed; the load is over. ``look``: called now and then.

        Raises:
            ChecksumError: a file has another digest; ReadError: it cannot be read; whenever it is called.
            WeightLoadError: it was closed before that was known, or this is a forked child.
        """
        if self._process.is_parent():
            raise WeightLoadError("this load was begun before fork(): the threads that check it are the parent's")
        self._over = True
        with self._turn:
            self._wait(look)
            if not self._stopped:
                # Give the jobs no name here: an exception's traceback would keep them, and their files.
                self._start([job for work in self._all for job in self._last_jobs(work)])
                self._wait(look)
            self._let_go()
        if self._failures:
            raise self._failures[0].with_traceback(None)
        if self._stopped:
            raise WeightLoadError("the load was left before its files were checked")

    def close(self) -> None:
        """Stop, and wait for the threads; a forked child, which has none of them, only lets go of the files."""
        if self._process.is_parent():
            self._all, self._work, self._files = [], [], []
            return
        self._stopped = True
        if _C.in_thread_of_loads():  # the garbage collector's finaliser, while the thread holds a lock perhaps
            _C.close_later(self)
            return
        self._wait()
        self._let_go()

    def _wait(self, look: Callable[[], None] = lambda: None) -> None:
        # Do not use Thread.join: when a signal's exception breaks it off, it takes the thread for ended.
        while self._running and not (self._stopped and _C.is_exiting()):  # Python ends the threads then, anywhere
            self._woken.acquire(timeout=0.1)
            look()
        if self._work and not self._stopped:
            self._run()

    def _let_go(self) -> None:
        for work in self._all:
            if work.tap is not None:
                work.tap.close()
        self._all, self._work, self._files = [], [], []  # the files

    def _run(self) -> None:
        try:
            while self._work and not self._stopped:
                try:
                    job = self._work.pop()
                except IndexError as taken:  # by another thread
                    pass_on(taken)
                    return
                job()
        except BaseException as error:  # for the consumer
            if not isinstance(error, _StoppedError):
                self._failures.append(error.with_traceback(None))  # which has the file in it
            self._stopped = True

    def _require_wanted(self) -> None:
        if self._stopped:
            raise _StoppedError

    def _check(self, work: Work, reading: Reading | None) -> None:
        def arrived(at: int) -> Any:
            while not self._stopped:
                over = self._over  # before: what comes last may come between the two
                piece = reading.take(at) if reading is not None else None
                if piece is not None or reading is None:
                    return piece
                if over:
                    return self._missing(work.file, reading, at)
                reading.wait()
            raise _StoppedError

        check(work.file, work.expected, arrived)

    def _combine(self, work: Work, reading: CrcReading) -> None:
        """Combine the CRC of what the load was given; ask for the rest."""
        kind = kind_of(work.expected)
        whole = hashes.Crc(kind)
        for begin, end, crc in reading.in_order(work.file.size):
            if crc is not None:
                whole.append(crc)
                continue
            for at in range(begin, end, PIECE):
                whole.update(self._asked(work.file.remote, at, min(PIECE, end - at)))
        _require_equal(work.file, whole.hexdigest(), work.expected)

    def _missing(self, file: _C.CheckpointFile, reading: Reading, at: int) -> Any:
        """Ask for bytes that the load was not given, or that were not kept: those must be the same again."""
        begin, end, known = reading.gap(at, min(at + PIECE, file.size))
        data = self._asked(file.remote, begin, end - begin)
        if known is not None and hashlib.sha256(data).digest() != known:
            raise located(ChecksumError(f"{printable(file.path)}: {DIFFERENT}, from {begin} on"), file.path)
        return data[at - begin :]

    def _asked(self, source: Any, at: int, count: int) -> Any:
        """Ask a server for a range; the wait ends when nobody wants the verdict any more."""
        answer = source.ask(at, count, tapped=False)
        while not answer.wait(0.1):
            if self._stopped:
                answer.cancel()
                raise _StoppedError
        return memoryview(answer.bytes())


class _StoppedError(Exception):
    """Nobody wants the verdict any more."""


def check(file: _C.CheckpointFile, expected: str, arrived: Callable[[int], Any] = lambda at: None) -> None:
    """Hash a file.

    Args:
        expected: the digest, as ``expected_digests`` has it.
        arrived: bytes from an offset on that somebody has read already, if there are any.

    Raises:
        ChecksumError: it has another digest. ReadError: it cannot be read.
    """
    hashed = hashes.new(kind_of(expected))
    memory = bytearray(min(PIECE, max(file.size, 1)))
    at = 0
    while at < file.size:
        piece = arrived(at)
        if piece is None:
            piece = memoryview(memory)[: min(PIECE, file.size - at)]
            file.read_into(at, piece)
        hashed.update(piece)
        at += len(piece)
    _require_equal(file, hashed.hexdigest(), expected)


def kind_of(expected: str) -> str:
    return expected.partition(":")[0]


def _require_equal(file: _C.CheckpointFile, found: str, expected: str) -> None:
    kind, _, right = expected.partition(":")
    if found != right:
        what = f"{printable(file.path)}: its {KINDS[kind].shown} is {found}, and should be {right}"
        raise located(ChecksumError(what), file.path)
