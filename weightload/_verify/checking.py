"""A load that is checked: what its ranks agree on before, and the verdict at its end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from weightload import _C
from weightload._base.addresses import is_address
from weightload._base.handlers import pass_on
from weightload._base.printable import printable
from weightload._base.uncopied import Load, StandsForALoad
from weightload._checkpoint.selection import Opening
from weightload._group.agreement import DISK, NOT_CHECKED, VERIFY, digest
from weightload._group.ranks import is_one_node
from weightload._verify import hashes
from weightload._verify.checker import Checker, kind_of
from weightload._verify.digests import Verify, expected_digests
from weightload.errors import ChecksumError, ReadError, WeightLoadError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")


class Ranks(NamedTuple):
    """The ranks that load together, and deal out the files that they check."""

    number: int
    """This rank's number among them."""
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
        """Wrap ``open_them``: when it has opened the files, the hashing begins."""

        def opened() -> list[_C.CheckpointFile]:
            expected = expected_digests(self._paths, self._verify)
            hashes.require(map(kind_of, expected))
            before = _stamps(self._paths)
            files = open_them()
            try:
                mine = [True] * len(files)
                self._same = {VERIFY: f"digests {digest(expected)}", DISK: ""}
                if self._ranks is not None:
                    # If the stamps are the same before and after the opening, they are those of the opened files.
                    one_disk = self._ranks.one_node and before is not None and before == _stamps(self._paths)
                    mine = _dealt(files, self._ranks, one_disk)
                    headers = [hashlib.sha256(_header(file)).hexdigest() for file in files if file.is_remote]
                    stamps = before or [] if one_disk else []
                    self._same[DISK] = digest([str(self._ranks.size), *headers, *stamps])
                self._checker = Checker(files, expected, mine, self._ranks is None)
                return self._checker.take_files()
            finally:
                files.clear()  # an exception's traceback would keep them open

        return opened

    def same(self) -> dict[str, object]:
        """The terms that the ranks must agree on, once the files are open."""
        return self._same

    def start(self, load: Callable[[], Any]) -> CheckedWeights:
        """Start the load."""
        try:
            weights = load()
            assert self._checker is not None
            return CheckedWeights(weights, self._checker, self.verdict)
        except BaseException:
            self._close()
            raise

    def run(self, load: Callable[[], Result], look: Callable[[], None] = lambda: None) -> Result:
        """Run a load to its end; return its result if the files are right. Raises as ``Checker.finish``.

        ``look``: called while that waits; ends it by an exception.
        """
        results = []
        try:
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
    """Run a load that opens a file and ends before it returns; return its result if the file is right."""
    if verify is None:
        return load(open_it)
    checking = Checking([path], verify)
    return checking.run(lambda: load(checking.opening(open_it)))


def _stamps(paths: Sequence[str]) -> list[str] | None:
    """Stamp the files that are not servers'. No other file has the same stamp, and a changed file gets another one.

    None where a file cannot be asked: opening it will say why.
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
    """The header of a server's object, as it was when it was opened."""
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
