"""SHA-256 of whole files, while they are loaded."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weightload import _C
from weightload._base.cpus import usable_cpus
from weightload._base.uncopied import Uncopied
from weightload._checkpoint.digests import Verify, expected_digests
from weightload.errors import ChecksumError, located

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
        self._work = list(zip(files, expected, strict=True))
        self._next = 0
        self._lock = threading.Lock()
        self._stopped, self._over = threading.Event(), threading.Event()
        self._taps = [Tap(file.remote) if file.is_remote else None for file in files]
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, name="weightload-sha256", daemon=True)
            for _ in range(min(len(self._work), usable_cpus()))
        ]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Wait until all is hashed; the load is over.

        Raises:
            ChecksumError: a file has another digest; ReadError: it cannot be read.
        """
        self._over.set()
        for thread in self._threads:
            while thread.is_alive():
                thread.join(0.1)  # Ctrl-C is felt between two
        self._work.clear()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure.with_traceback(None)

    def close(self) -> None:
        """Stop, and wait for the threads."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._work.clear()
        self._failure = None

    def _run(self) -> None:
        while not self._stopped.is_set():
            with self._lock:
                number, self._next = self._next, self._next + 1
            if number >= len(self._work):
                return
            try:
                self._check(*self._work[number], self._taps[number])
            except BaseException as error:  # for the consumer
                with self._lock:
                    self._failure = self._failure or error
                self._stopped.set()

    def _check(self, file: _C.CheckpointFile, expected: str, tap: Tap | None) -> None:
        def arrived(at: int) -> memoryview | None:
            while not self._stopped.is_set():
                over = self._over.is_set()  # before: what comes last may come between the two
                piece = tap.take(at) if tap is not None else None
                if piece is not None or tap is None or over:
                    return piece
                tap.wait()
            raise _StoppedError

        with contextlib.suppress(_StoppedError):
            check(file, expected, arrived)


class Checking:
    """A load that is to be checked, before its files are open."""

    def __init__(self, paths: Sequence[str], verify: Verify) -> None:
        self._paths, self._verify = paths, verify
        self._checker: Checker | None = None

    def opening(self, open_them: Callable[[], list[_C.CheckpointFile]]) -> Callable[[], list[_C.CheckpointFile]]:
        """The same, and the hashing begins."""

        def opened() -> list[_C.CheckpointFile]:
            expected = expected_digests(self._paths, self._verify)
            files = open_them()
            self._checker = Checker(files, expected)
            return files

        return opened

    def watch(self, weights: Any) -> CheckedWeights:
        """The load with its verdict."""
        assert self._checker is not None
        return CheckedWeights(weights, self._checker)

    def close(self) -> None:
        """There is no load."""
        if self._checker is not None:
            self._checker.close()


class _StoppedError(Exception):
    """Nobody wants the verdict any more."""


def check(
    file: _C.CheckpointFile, expected: str, arrived: Callable[[int], memoryview | None] = lambda at: None
) -> None:
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


class Tap:
    """What a load has been given of a server's object, kept until it is hashed.

    What there is no room for is asked for again in the end.
    """

    MOST = 512 << 20  # bytes

    def __init__(self, source: Any) -> None:
        self._arrived = threading.Condition()
        self._chunks: dict[int, memoryview] = {0: memoryview(source.start)} if len(source.start) else {}
        self._held = 0
        source.tap = self.give

    def give(self, begin: int, data: Any) -> None:
        """For the thread that has the answers."""
        with self._arrived:
            if self._held + len(data) <= self.MOST:
                self._held += len(data)
                self._chunks[begin] = memoryview(data)
                self._arrived.notify()

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
                    self._held -= len(data) if begin else 0
                elif begin <= at:
                    return data[at - begin :]
            return None


class CheckedWeights(Uncopied):
    """A load's items, and at their end the verdict on the files; otherwise as the load itself."""

    def __init__(self, weights: Any, checker: Checker) -> None:
        self._weights, self._checker = weights, checker
        self.agreement_seconds = self._weights.agreement_seconds
        self.total_bytes = self._weights.total_bytes

    def __iter__(self) -> CheckedWeights:
        return self

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

    def __enter__(self) -> CheckedWeights:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the load and the hashing."""
        self._weights.close()
        self._checker.close()

    def stats(self) -> LoadStats:
        """What the load has done so far."""
        stats: LoadStats = self._weights.stats()
        return stats
