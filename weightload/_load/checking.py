"""Digests of whole files, while they are loaded."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from weightload import _C, settings
from weightload._base.addresses import is_address
from weightload._base.cpus import usable_cpus
from weightload._base.handlers import pass_on
from weightload._base.printable import printable
from weightload._base.uncopied import Load, Process, StandsForALoad
from weightload._checkpoint import hashes
from weightload._checkpoint.digests import KINDS, SHA256, Verify, expected_digests
from weightload._checkpoint.selection import Opening
from weightload._group.agreement import DISK, NOT_CHECKED, VERIFY, digest
from weightload._group.ranks import is_one_node
from weightload._remote.tap import DIFFERENT, Budget, Reading, Tap
from weightload.errors import ChecksumError, ReadError, WeightLoadError, located

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

PIECE = 8 << 20  # bytes that are read and hashed at a time
PART = 64 << 20  # of a local file, which a thread hashes where the digest can be made of those of parts

Result = TypeVar("Result")


class Work(NamedTuple):
    """A file that is to be checked."""

    file: _C.CheckpointFile
    expected: str
    tap: Tap | None
    mine: bool
    """Whether this process checks it in any case. If not, another does; what a server has this one checks, too, if it
    was given any of it: nobody else has these bytes."""


class Parts:
    """A local file whose CRC is made of its parts', which are hashed in any order."""

    def __init__(self, file: _C.CheckpointFile, expected: str) -> None:
        self.file, self._expected = file, expected
        self._lock = threading.Lock()
        self._left = list(range(0, max(file.size, 1), PART))
        self._hashed: dict[int, hashes.Crc] = {}

    @property
    def begins(self) -> list[int]:
        return list(self._left)

    def hash(self, begin: int, require_wanted: Callable[[], None]) -> None:
        """One of them. The last one has the verdict. Raises as ``check``, and what ``require_wanted`` does."""
        crc = hashes.Crc(_kind(self._expected))
        end = min(begin + PART, self.file.size)
        memory = bytearray(min(PIECE, max(end - begin, 1)))
        for at in range(begin, end, PIECE):
            require_wanted()
            piece = memoryview(memory)[: min(PIECE, end - at)]
            self.file.read_into(at, piece)
            crc.update(piece)
        with self._lock:
            self._hashed[begin] = crc
            self._left.remove(begin)
            if self._left:
                return
        first, *others = (self._hashed[at] for at in sorted(self._hashed))
        for later in others:
            first.append(later)
        _require_equal(self.file, first.hexdigest(), self._expected)


class Checker:
    """Threads that hash files, of which a load reads tensors at the same time: one a file, as many as there are CPUs.

    Several a local file, where its digest can be made of those of parts.

    They read by the descriptor that the load reads by, through the page cache. What a server has they take from what
    the load asks for; the rest they ask for themselves, when the load is over.
    """

    def __init__(self, files: Sequence[_C.CheckpointFile], expected: Sequence[str], mine: Sequence[bool]) -> None:
        budget = Budget()
        self._all: list[Work] = []
        known: set[int] = set()
        for file, right, whose in zip(files, expected, mine, strict=True):
            if id(file) not in known:
                known.add(id(file))
                tap = Tap(file.remote, file.data_begin, budget) if file.is_remote else None
                self._all.append(Work(file, right, tap, whose))
        self._lock = threading.Lock()  # guards the list below, how many threads run, and the failure
        self._work: list[Callable[[], None]] = []  # from the last on
        self._running = 0
        self._process = Process()
        self._turn = threading.RLock()  # whose turn it is to finish: threads may share an iterator
        self._stopped, self._over, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        try:
            self._start([job for work in self._all if work.mine for job in self._jobs(work)])
        except BaseException:
            self.close()
            raise

    def _jobs(self, work: Work) -> list[Callable[[], None]]:
        """What is to be done of a file from the beginning on."""
        if work.tap is not None:
            return [functools.partial(self._check, work, work.tap.readings[0])]
        if _kind(work.expected) == SHA256:
            return [functools.partial(self._check, work, None)]
        parts = Parts(work.file, work.expected)
        return [functools.partial(parts.hash, begin, self._require_wanted) for begin in parts.begins]

    def _start(self, work: list[Callable[[], None]]) -> None:
        """Have this done; what was to be done is. Where no thread can be started, by who waits for it."""
        count = min(len(work), usable_cpus())
        self._work = work[::-1]
        self._ended.clear()
        if not work:
            self._ended.set()
        with self._lock:  # until all are there: none is the last before
            for _ in range(count):
                try:
                    threading.Thread(target=self._run, name="weightload-verify", daemon=True).start()
                except RuntimeError as none_left:
                    pass_on(none_left)
                    break
                self._running += 1

    def finish(self, look: Callable[[], None] = lambda: None) -> None:
        """Wait until all is hashed; the load is over. ``look``: called now and then.

        Raises:
            ChecksumError: a file has another digest; ReadError: it cannot be read; whenever it is called.
            WeightLoadError: it was closed before that was known, or this is a forked child.
        """
        if self._process.is_parent():
            raise WeightLoadError("this load was begun before fork(): the threads that check it are the parent's")
        self._over.set()
        with self._turn:
            self._wait(look)
            rest: list[Callable[[], None]] = [
                functools.partial(self._check, work, reading)
                for work in self._all
                if work.tap is not None and work.tap.used and not self._stopped.is_set()
                for reading in work.tap.readings[1 if work.mine else 0 :]
            ]
            if rest:
                self._start(rest)
                self._wait(look)
            self._let_go()
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if self._stopped.is_set():
            raise WeightLoadError("the load was left before its files were checked")

    def close(self) -> None:
        """Stop, and wait for the threads; in a forked child, which has none of them, nothing."""
        if self._process.is_parent():
            return
        self._stopped.set()
        self._wait()
        self._let_go()

    def _wait(self, look: Callable[[], None] = lambda: None) -> None:
        # Not by Thread.join: one that a signal's exception breaks off takes the thread for ended.
        while self._running and not self._ended.wait(0.1):
            look()
        if self._work and not self._stopped.is_set():
            with self._lock:
                self._running += 1
            self._run()

    def _let_go(self) -> None:
        for work in self._all:
            if work.tap is not None:
                work.tap.close()
        self._all, self._work = [], []  # the files

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                with self._lock:
                    if not self._work:
                        return
                    job = self._work.pop()
                job()
        except BaseException as error:  # for the consumer
            with self._lock:
                if not isinstance(error, _StoppedError):
                    self._failure = self._failure or error.with_traceback(None)  # which has the file in it
            self._stopped.set()
        finally:
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self._ended.set()

    def _require_wanted(self) -> None:
        if self._stopped.is_set():
            raise _StoppedError

    def _check(self, work: Work, reading: Reading | None) -> None:
        def arrived(at: int) -> Any:
            while not self._stopped.is_set():
                over = self._over.is_set()  # before: what comes last may come between the two
                piece = reading.take(at) if reading is not None else None
                if piece is not None or reading is None:
                    return piece
                if over:
                    return self._missing(work.file, reading, at)
                reading.wait()
            raise _StoppedError

        check(work.file, work.expected, arrived)

    def _missing(self, file: _C.CheckpointFile, reading: Reading, at: int) -> Any:
        """What the load has not been given, or what was not kept: that must be the same again."""
        begin, end, known = reading.gap(at, min(at + PIECE, file.size))
        data = self._asked(file.remote, begin, end - begin)
        if known is not None and hashlib.sha256(data).digest() != known:
            raise located(ChecksumError(f"{printable(file.path)}: {DIFFERENT}, from {begin} on"), file.path)
        return data[at - begin :]

    def _asked(self, source: Any, at: int, count: int) -> Any:
        """What a server has there; not waited for when nobody wants the verdict any more."""
        answer = source.ask(at, count, tapped=False)
        while not answer.wait(0.1):
            if self._stopped.is_set():
                answer.cancel()
                raise _StoppedError
        return memoryview(answer.bytes())


class Ranks(NamedTuple):
    """The ranks that load together, and deal out the files that they check."""

    number: int
    """Of this one among them."""
    size: int
    one_node: bool
    """Whether they have one page cache: what one of them hashes there, all have."""
    first_asks: bool = False
    """Whether the first of them asks servers for all that is shared."""
    meets: bool = False
    """Whether they tell each other in a meeting behind the load; if not, it is told otherwise."""

    @staticmethod
    def of(group: ProcessGroup, strategy: str) -> Ranks:
        """Those of an iterator's group."""
        return Ranks(group.rank(), group.size(), is_one_node(group), strategy == "broadcast", meets=True)


class Checking:
    """A load that is to be checked, from before its files are open on.

    Attributes:
        meets: whether its ranks meet behind it.
        verdict: that meeting, once they have agreed to load.
    """

    def __init__(self, paths: Sequence[str], verify: Verify, ranks: Ranks | None = None) -> None:
        self._paths, self._verify, self._ranks = paths, verify, ranks
        self._checker: Checker | None = None
        self._same: dict[str, object] = dict(NOT_CHECKED)
        self.meets = ranks is not None and ranks.meets
        self.verdict: _C.Verdict | None = None

    def opening(self, open_them: Opening) -> Opening:
        """The same, and the hashing begins."""

        def opened() -> list[_C.CheckpointFile]:
            expected = expected_digests(self._paths, self._verify)
            hashes.require(map(_kind, expected))
            before = _stamps(self._paths)
            files = open_them()
            try:
                mine = [True] * len(files)
                self._same = {VERIFY: f"digests {digest(expected)}", DISK: ""}
                if self._ranks is not None:
                    # What was at a path before it was opened, and is so after that, is what was opened.
                    one_disk = self._ranks.one_node and before is not None and before == _stamps(self._paths)
                    mine = _dealt(files, self._ranks, one_disk)
                    headers = [hashlib.sha256(_header(file)).hexdigest() for file in files if file.is_remote]
                    stamps = before or [] if one_disk else []
                    self._same[DISK] = digest([str(self._ranks.size), *headers, *stamps])
                self._checker = Checker(files, expected, mine)
            except BaseException:
                files.clear()  # an exception's traceback would keep them open
                raise
            return files

        return opened

    def same(self) -> dict[str, object]:
        """What the ranks must agree on, once the files are open."""
        return self._same

    def start(self, load: Callable[[], Any]) -> CheckedWeights:
        """Start the load. Both read through the page cache: each finds there what the other has read."""
        try:
            with settings.override(read="buffered"):
                weights = load()
            assert self._checker is not None
            return CheckedWeights(weights, self._checker, self.verdict)
        except BaseException:
            self._close()
            raise

    def run(self, load: Callable[[], Result], look: Callable[[], None] = lambda: None) -> Result:
        """What the load gives, which ends before it returns, if the files are right. Raises as ``Checker.finish``.

        ``look``: called while that waits; ends it by an exception.
        """
        results = []
        try:
            with settings.override(read="buffered"):
                results.append(load())
            assert self._checker is not None
            self._checker.finish(look)
            return results.pop()
        except BaseException:
            results.clear()  # an exception's traceback would keep it
            self._close()
            raise

    def _close(self) -> None:
        if self._checker is not None:
            self._checker.close()
        if self.verdict is not None:
            self.verdict.close()


def checked(path: str, verify: Verify | None, open_it: Opening, load: Callable[[Opening], Result]) -> Result:
    """What a load gives of a file that it opens, and ends before it returns; if the file is right."""
    if verify is None:
        return load(open_it)
    checking = Checking([path], verify)
    return checking.run(lambda: load(checking.opening(open_it)))


class _StoppedError(Exception):
    """Nobody wants the verdict any more."""


def _stamps(paths: Sequence[str]) -> list[str] | None:
    """Of the files that are not servers', what no other file has, and this one no more when it was changed.

    None where one cannot be asked: opening it will say why.
    """
    found = []
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        for path in paths:
            if is_address(path):
                from weightload._remote import hub

                path = hub.local(path)
            if not is_address(path):
                status = os.stat(path)
                times = status.st_mtime_ns, status.st_ctime_ns
                found.append(f"{boot} {status.st_dev} {status.st_ino} {status.st_size} {times}")
    except (OSError, ValueError) as failed:
        pass_on(failed)
        return None
    return found


def _header(file: _C.CheckpointFile) -> bytes:
    """What a server's object began with when it was opened."""
    return bytes(file.remote.start[: file.data_begin])


def _dealt(files: Sequence[_C.CheckpointFile], ranks: Ranks, one_disk: bool) -> list[bool]:
    """Which files this rank checks: the largest first, each goes to the rank with the fewest bytes.

    Files that are not on one disk for all of them every rank checks.
    """
    bytes_of = [0] * ranks.size
    owner: list[int | None] = [None] * len(files)
    dealt = sorted(range(len(files)), key=lambda number: (not files[number].is_remote, -files[number].size))
    for number in dealt:
        if files[number].is_remote or one_disk:
            to = 0 if files[number].is_remote and ranks.first_asks else bytes_of.index(min(bytes_of))
            bytes_of[to] += files[number].size
            owner[number] = to
    return [to is None or to == ranks.number for to in owner]


def check(file: _C.CheckpointFile, expected: str, arrived: Callable[[int], Any] = lambda at: None) -> None:
    """Hash a file.

    Args:
        expected: the digest, as ``expected_digests`` has it.
        arrived: bytes from an offset on that somebody has read already, if there are any.

    Raises:
        ChecksumError: it has another digest. ReadError: it cannot be read.
    """
    hashed = hashes.new(_kind(expected))
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


def _kind(expected: str) -> str:
    return expected.partition(":")[0]


def _require_equal(file: _C.CheckpointFile, found: str, expected: str) -> None:
    kind, _, right = expected.partition(":")
    if found != right:
        what = f"{printable(file.path)}: its {KINDS[kind].shown} is {found}, and should be {right}"
        raise located(ChecksumError(what), file.path)


class CheckedWeights(StandsForALoad):
    """A load's items, and at their end the verdict on the files; otherwise as the load itself.

    The verdict is that of all ranks of a group: each waits there for the others.
    """

    __del__ = _C.finish  # close(): a loop that was left early stops the hashing, too

    def __init__(self, weights: Load, checker: Checker, verdict: _C.Verdict | None) -> None:
        super().__init__(weights)
        self._checker, self._verdict = checker, verdict

    def __next__(self) -> tuple[str, torch.Tensor]:
        try:
            return next(self._weights)
        except StopIteration:
            self._finish()
            raise
        except BaseException:
            self.close()
            raise

    def _finish(self) -> None:
        if self._verdict is None:
            self._checker.finish()
            return
        own: Exception | None = None
        try:
            try:
                self._checker.finish()
            except Exception as error:
                pass_on(error)
                own = error.with_traceback(None)
            try:
                self._verdict.conclude(*(_said(own) if own is not None else ("", b"", b"")))
            except WeightLoadError:
                if own is None or isinstance(own, (ChecksumError, ReadError)):
                    raise
                raise own from None  # of a class that the ranks do not tell one another
        except BaseException:
            self.close()
            raise
        finally:
            own = None

    def close(self) -> None:
        """Stop the load and the hashing; the ranks that wait for a verdict hear of it."""
        super().close()
        self._checker.close()
        if self._verdict is not None:
            self._verdict.close()


def _said(error: Exception) -> tuple[str, bytes, bytes]:
    """The kind of an error, its message without its file, and its file."""
    kind = "checksum" if isinstance(error, ChecksumError) else "read" if isinstance(error, ReadError) else "other"
    where = getattr(error, "filename", None)
    path = where if isinstance(where, str) else ""
    message = str(error).removeprefix(f"{path}: ").removeprefix(f"{printable(path)}: ")
    if kind == "other":
        message = f"{type(error).__name__}: {message}"
    return kind, message.encode("utf-8", "surrogateescape"), os.fsencode(path)
