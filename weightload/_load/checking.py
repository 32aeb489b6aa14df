"""SHA-256 of whole files, while they are loaded."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weightload import _C, settings
from weightload._base.cpus import usable_cpus
from weightload._base.uncopied import StandsForALoad
from weightload._checkpoint.digests import Verify, expected_digests
from weightload.errors import ChecksumError, WeightLoadError, located

if TYPE_CHECKING:
    import torch

    from weightload._base.load_stats import LoadStats

PIECE = 8 << 20  # bytes that are read and hashed at a time


class Checker:
    """Threads that hash files, of which a load reads tensors at the same time: one a file, as many as there are CPUs.

    They read by the descriptor that the load reads by, through the page cache. What a server has they take from what
    the load asks for; the rest they ask for themselves, when the load is over.
    """

    def __init__(self, files: Sequence[_C.CheckpointFile], expected: Sequence[str]) -> None:
        distinct = {id(file): (file, digest) for file, digest in zip(files, expected, strict=True)}
        budget = Budget()
        self._work = [
            (file, digest, Tap(file.remote, budget) if file.is_remote else None) for file, digest in distinct.values()
        ]
        self._next = self._running = 0
        self._lock = threading.Lock()  # guards the two above, and the failure
        self._stopped, self._over, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        if not self._work:
            self._ended.set()
        try:
            for _ in range(min(len(self._work), usable_cpus())):
                thread = threading.Thread(target=self._run, name="weightload-sha256", daemon=True)
                with self._lock:
                    thread.start()
                    self._running += 1
                    self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """Wait until all is hashed; the load is over.

        Raises:
            ChecksumError: a file has another digest; ReadError: it cannot be read; whenever it is called.
            WeightLoadError: it was closed before that was known.
        """
        self._over.set()
        self._wait()
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if self._stopped.is_set():
            raise WeightLoadError("the load was left before its files were checked")

    def close(self) -> None:
        """Stop, and wait for the threads."""
        self._stopped.set()
        self._wait()

    def _wait(self) -> None:
        # Not by Thread.join: one that a signal's exception breaks off takes the thread for ended.
        while self._threads and not self._ended.wait(0.1):
            pass
        for _, _, tap in self._work:
            if tap is not None:
                tap.close()
        self._work = []  # the files

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                with self._lock:
                    number = self._next
                    if number >= len(self._work):
                        return
                    self._next += 1
                self._check(*self._work[number])
        except BaseException as error:  # for the consumer
            with self._lock:
                if not isinstance(error, _StoppedError):
                    self._failure = self._failure or error
            self._stopped.set()
        finally:
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self._ended.set()

    def _check(self, file: _C.CheckpointFile, expected: str, tap: Tap | None) -> None:
        def arrived(at: int) -> Any:
            while not self._stopped.is_set():
                over = self._over.is_set()  # before: what comes last may come between the two
                piece = tap.take(at) if tap is not None else None
                if piece is not None or tap is None:
                    return piece
                if over:
                    return self._missing(file, tap, at)
                tap.wait()
            raise _StoppedError

        check(file, expected, arrived)

    def _missing(self, file: _C.CheckpointFile, tap: Tap, at: int) -> Any:
        """What the load has not been given, or what was not kept: that must be the same again."""
        begin, end, digest = tap.gap(at, min(at + PIECE, file.size))
        data = self._asked(file.remote, begin, end - begin)
        if digest is not None and hashlib.sha256(data).digest() != digest:
            what = f"{file.path}: the server has given two different answers for the same bytes, from {begin} on"
            raise located(ChecksumError(what), file.path)
        return data[at - begin :]

    def _asked(self, source: Any, at: int, count: int) -> Any:
        """What a server has there; not waited for when nobody wants the verdict any more."""
        answer = source.ask(at, count)
        while not answer.wait(0.1):
            if self._stopped.is_set():
                answer.cancel()
                raise _StoppedError
        return memoryview(answer.bytes())


class Checking:
    """A load that is to be checked, before its files are open."""

    def __init__(self, paths: Sequence[str], verify: Verify, shared: bool) -> None:
        self._paths, self._verify, self._shared = paths, verify, shared
        self._checker: Checker | None = None

    def opening(self, open_them: Callable[[], list[_C.CheckpointFile]]) -> Callable[[], list[_C.CheckpointFile]]:
        """The same, and the hashing begins."""

        def opened() -> list[_C.CheckpointFile]:
            expected = expected_digests(self._paths, self._verify)
            files = open_them()
            if self._shared and any(file.is_remote for file in files):
                files.clear()
                raise ValueError(
                    'verify=: ranks cannot share what a server has and check it; use strategy="independent"'
                )
            self._checker = Checker(files, expected)
            return files

        return opened

    def start(self, load: Callable[[], Any]) -> CheckedWeights:
        """Start the load. Both read through the page cache: each finds there what the other has read."""
        try:
            with settings.override(read="buffered"):
                weights = load()
            assert self._checker is not None
            return CheckedWeights(weights, self._checker)
        except BaseException:
            if self._checker is not None:
                self._checker.close()
            raise


class _StoppedError(Exception):
    """Nobody wants the verdict any more."""


def check(file: _C.CheckpointFile, expected: str, arrived: Callable[[int], Any] = lambda at: None) -> None:
    """Hash a file.

    Args:
        expected: the digest in hexadecimal digits.
        arrived: bytes from an offset on that somebody has read already, if there are any.

    Raises:
        ChecksumError: it has another digest. ReadError: it cannot be read.
    """
    digest = hashlib.sha256()
    memory = bytearray(min(PIECE, max(file.size, 1)))
    at = 0
    while at < file.size:
        piece = arrived(at)
        if piece is None:
            piece = memoryview(memory)[: min(PIECE, file.size - at)]
            file.read_into(at, piece)
        digest.update(piece)
        at += len(piece)
    if digest.hexdigest() != expected:
        what = f"{file.path}: its SHA-256 is {digest.hexdigest()}, and should be {expected}"
        raise located(ChecksumError(what), file.path)


class Budget:
    """Bytes that the taps of a load may hold together."""

    MOST = 512 << 20

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = 0

    def take(self, count: int) -> bool:
        """Whether there is room for so many more."""
        with self._lock:
            if self._held + count > self.MOST:
                return False
            self._held += count
            return True

    def give_back(self, count: int) -> None:
        with self._lock:
            self._held -= count


class Tap:
    """What a load has been given of a server's object, kept until it is hashed.

    Of what there is no room for the digest is kept: it is asked for again in the end, and must be the same.
    """

    def __init__(self, source: Any, budget: Budget) -> None:
        self._source, self._budget = source, budget
        self._arrived = threading.Condition()
        self._chunks: dict[int, memoryview] = {}
        self._dropped: dict[int, tuple[int, bytes]] = {}  # their ends and digests
        self._open = True
        self.give(0, source.start)
        source.tap = self.give

    def give(self, begin: int, data: Any) -> None:
        """For the thread that has the answers."""
        with self._arrived:
            if not self._open or not len(data) or begin in self._chunks or begin in self._dropped:
                return
            if self._budget.take(len(data)):
                self._chunks[begin] = memoryview(data)
            else:
                self._dropped[begin] = begin + len(data), hashlib.sha256(data).digest()
            self._arrived.notify_all()

    def wait(self) -> None:
        """Until more has come, or for a moment."""
        with self._arrived:
            self._arrived.wait(0.1)

    def take(self, at: int) -> memoryview | None:
        """Bytes from there on, if there are some; what is before is kept no longer."""
        with self._arrived:
            for begin, data in sorted(self._chunks.items()):
                if begin + len(data) <= at:
                    del self._chunks[begin]
                    self._budget.give_back(len(data))
                elif begin <= at:
                    return data[at - begin :]
            return None

    def gap(self, at: int, end: int) -> tuple[int, int, bytes | None]:
        """A range around an offset that is not here: one that was not kept, with its digest, or up to what is known."""
        with self._arrived:
            for begin, (until, digest) in self._dropped.items():
                if begin <= at < until:
                    return begin, until, digest
            later = [begin for begin in (*self._chunks, *self._dropped) if at < begin < end]
            return at, min(later, default=end), None

    def close(self) -> None:
        """Nothing is to be kept any more."""
        with self._arrived:
            self._open = False
            self._source.tap = None
            for data in self._chunks.values():
                self._budget.give_back(len(data))
            self._chunks.clear()


class CheckedWeights(StandsForALoad):
    """A load's items, and at their end the verdict on the files; otherwise as the load itself."""

    __del__ = _C.finish  # close(): a loop that was left early stops the hashing, too

    def __init__(self, weights: Any, checker: Checker) -> None:
        self._weights, self._checker = weights, checker
        self.agreement_seconds = self._weights.agreement_seconds
        self.total_bytes = self._weights.total_bytes

    def __next__(self) -> tuple[str, torch.Tensor]:
        try:
            item: tuple[str, torch.Tensor] = next(self._weights)
            return item
        except StopIteration:
            self._checker.finish()
            raise
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._weights)

    def close(self) -> None:
        """Stop the load and the hashing."""
        self._weights.close()
        self._checker.close()

    def stats(self) -> LoadStats:
        """What the load has done so far."""
        stats: LoadStats = self._weights.stats()
        return stats
