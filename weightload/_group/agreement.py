"""How the ranks of a group agree before the first byte of a load travels, and fail together."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from weightload import _C, errors, settings
from weightload._base.handlers import pass_on
from weightload._checkpoint.selection import Path, parts_in_order
from weightload._group.apart import Wishes
from weightload._group.ranks import NODE, RECORD_BYTES, load_name
from weightload._parts.shards import NO_PARTS, Parts
from weightload._version import __version__

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Files whose own digest is in the record, so that the first one that differs can be named.
NAMED_FILES = 32
AGREED, FAILED = b"\1", b"\0"
TOLD = "weightload_was_told"  # an attribute of exceptions
WISH_BYTES = 32  # at the end of a record: what the rank wants

STATES = "tags or times of what a server has"
VERIFY, DISK = "verify=", "files on disk, which verify= would have one rank check for all"
NOT_CHECKED: Mapping[str, object] = {VERIFY: "nothing", DISK: ""}
"""The terms of a load without ``verify=``; as all terms, the same on every rank."""


class Check(Protocol):
    """The check of a load's files: checking.Checking."""

    meets: bool
    verdict: _C.Verdict | None

    def same(self) -> Mapping[str, object]:
        """Its terms that must be the same on every rank, once the files are open."""


Chosen = tuple[list[_C.CheckpointFile], list[list[int]], Parts]
"""The files of a load, the tensors of each by number, and the parts of those of which not all is wanted."""


class Sharing:
    """This process's part in a load that the ranks of a group share: the agreement, then the group's part of a loader.

    Attributes:
        core: what a loader takes over, unless the ranks only agree (``"independent"``): None then.
            Where the ranks ``check`` the files, that has the meeting behind the load once they have agreed.
        differ: whether they want different tensors, or parts; see ``agree``.
        seconds: how long the agreement took, from the moment this rank was ready for it.
    """

    def __init__(
        self,
        group: ProcessGroup,
        strategy: str,
        device: torch.device,
        target: _C.DeviceTarget | None,
        paths: Sequence[Path],
        check: Check | None = None,
    ) -> None:
        load = load_name(paths)
        self._check, self._meets = check, check is not None and check.meets
        self.seconds = 0.0
        self._strategy, self._kind, self._load = strategy, device.type, load
        self._arguments = group, str(device), getattr(_C.Strategy, strategy), load
        self._group = self._join(target)
        self.core = None if strategy == "independent" else self._group
        self.differ = False
        self._records: list[bytes] = []

    def _join(self, target: _C.DeviceTarget | None) -> _C.Group:
        group, device, strategy, load = self._arguments
        return _C.Group(group, target, device, strategy, load)

    def agree(self, choose: Callable[[], Chosen], may_differ: bool = False) -> Chosen:
        """Open the files and pick tensors, then compare with the other ranks; the same on all, or an error on all.

        Args:
            choose: does the first two. Its list of files is empty after an error.
            may_differ: ranks may want different tensors and parts. Where they do, ``differ`` is true, and all ranks
                must call ``find_common`` next.

        Raises:
            RankDisagreementError: the ranks are about to load different things.
            GroupError: a rank cannot be reached.
            Exception: what a rank raised before the agreement, on every rank.
        """
        chosen: Chosen | None = None
        failure: BaseException | None = None
        try:
            chosen = choose()
            record = self._record(*chosen, may_differ)
        except BaseException as error:  # the others must not wait for a rank that was interrupted
            failure = error
            record = failed_record(error, self._load)
        try:
            if isinstance(failure, (KeyboardInterrupt, SystemExit)):
                self._tell(record)
                failure.__dict__[TOLD] = True
                raise failure
            begin = time.perf_counter()
            files, selection, _ = chosen or ([], [], NO_PARTS)
            more = self.core is not None and failure is None and any(map(_C.CheckpointFile.bytes_of, files, selection))
            if may_differ and chosen is not None:
                interrupted = failed_record(KeyboardInterrupt(), self._load).ljust(Wishes(files).record_bytes, b" ")
                records = self._group.agree(record, more, RECORD_BYTES - WISH_BYTES, interrupted, self._meets)
            else:
                records = self._group.agree(record, more, verdict=self._meets)
            self._records = records
            self.differ = not check(records, failure, may_differ)
            if chosen is None:
                raise errors.GroupError(f"{self._load}: this rank failed, and the others did not hear of it")
            if not self.differ:
                self._keep_verdict(loads=self.core is not None)
            self.seconds = time.perf_counter() - begin
        except BaseException:
            if chosen is not None:
                chosen[0].clear()
            raise
        finally:
            # Its traceback has this frame in it, and files in others.
            failure = None
        return chosen

    def find_common(self, chosen: Chosen, target: _C.DeviceTarget | None) -> list[list[int]]:
        """The tensors, by file, that ranks share which want different ones: those that all want in full.

        If there are any, ``core`` is for a load of these, to ``target``. Raises as ``agree``.
        """
        files, selection, parts = chosen
        begin = time.perf_counter()
        shared = self.core is not None
        try:
            wishes = Wishes(files)
            self._group.close()
            self.core, self._group = None, self._join(target)
            try:
                wish = AGREED + wishes.of_rank(selection, parts)
            except BaseException as error:
                self._tell(failed_record(error, self._load).ljust(wishes.record_bytes, b" "))
                raise
            records = self._group.agree(wish.ljust(wishes.record_bytes, b"\0"), shared, 1, verdict=self._meets)
            _raise_failure(records, None)
            if any(record[:1] != AGREED for record in records):
                raise errors.GroupError(f"{self._load}: other ranks are at another call")
            common = wishes.common([record[1:] for record in records])
            if common is None:
                check(self._records, None)  # raises
                raise errors.RankDisagreementError(f"{self._load}: tensors of one name from different files")
            if not shared or not any(common):
                self._keep_verdict(loads=False)
                self._group.close()
                return [[] for _ in files]
            self.core = self._group
            self._keep_verdict(loads=True)
            return common
        except BaseException:
            files.clear()
            raise
        finally:
            self.seconds += time.perf_counter() - begin

    def _keep_verdict(self, loads: bool) -> None:
        """The ranks have agreed, and if they check the files they meet behind the load. ``loads``: a loader comes."""
        if self._check is not None and self._meets:
            self._check.verdict = self._group.verdict()
            if not loads:
                self._group.let_go()

    def _tell(self, record: bytes) -> None:
        with contextlib.suppress(Exception):  # a communicator that is dead already changes nothing
            self._group.tell(record)  # without waiting for ranks that may be late

    def close(self) -> None:
        """Leave the load; the other ranks are told. Nothing to do once a loader has taken over."""
        self._group.close()

    def _record(
        self, files: list[_C.CheckpointFile], selection: list[list[int]], parts: Parts, may_differ: bool
    ) -> bytes:
        """Terms that must be the same on every rank."""
        now = settings.current()
        same: dict[str, object] = {
            "strategy": self._strategy,
            "device": self._kind,
            "block_bytes": now.block_bytes if self._kind == "cpu" else now.device_block_bytes,
            "rename= (all of a group or none)": not may_differ,
        } | dict(NOT_CHECKED if self._check is None else self._check.same())
        chosen = f"{_C.selection_digest(files, selection):016x}"
        return agreed_record(
            self._load, same | of_files(files), chosen + digest(map(repr, parts_in_order(files, selection, parts)))
        )


def agreed_record(load: str, same: Mapping[str, object], wish: str = "") -> bytes:
    """The message of a rank that is ready: as JSON, so that a difference can be said in words.

    At the end are the digests of what it wants, ``selection`` and ``parts``, in which iterators' ranks may differ.
    """
    fields = {"load": load[:100], "versions": [__version__, torch.__version__], **same}
    text = AGREED + json.dumps(fields, separators=(",", ":")).encode()
    return text.ljust(RECORD_BYTES - WISH_BYTES, b" ") + wish.encode().ljust(WISH_BYTES)


def of_files(files: Sequence[_C.CheckpointFile], named: bool = True) -> dict[str, object]:
    """Terms of files that must be the same on every rank: names, sizes, headers, which are read for it, and tags.

    ``named``: false where ranks may have copies of their own, by other names.
    """
    names = [os.path.basename(file.path) if named else "" for file in files]
    sizes = [str(file.size) for file in files]
    headers = [f"{file.header_digest():016x}" for file in files]
    states = [repr(file.remote.same) if named and file.is_remote else "" for file in files]
    return {
        "number of files": len(files),
        "file names": digest(names),
        "file sizes": digest(sizes),
        "headers": digest(headers),
        STATES: digest(states),
        "files": [digest(one)[:8] for one in list(zip(names, sizes, headers, states, strict=True))[:NAMED_FILES]],
    }


def digest(texts: Iterable[str]) -> str:
    """Equal for equal texts."""
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def check(records: list[bytes], failure: BaseException | None, may_differ: bool = False) -> bool:
    """Raise what every rank raises, if one has failed or they differ: ``was_told`` is true of it.

    Returns:
        Whether all are the same. If not, they differ in what they want, as they ``may``.
    """
    try:
        return _check(records, failure, may_differ)
    except BaseException as error:
        error.__dict__[TOLD] = True
        raise
    finally:
        failure = None  # its traceback may lead here


def was_told(error: BaseException) -> bool:
    """Whether every rank raises this error: it is what their records say."""
    return TOLD in error.__dict__


def _check(records: list[bytes], failure: BaseException | None, may_differ: bool) -> bool:
    if any(record[:1] == NODE for record in records):
        raise errors.GroupError("ranks of the group are at different calls: some ask for the nodes of its ranks")
    _raise_failure(records, failure)
    if all(record == records[0] for record in records):
        return True
    wish = RECORD_BYTES - WISH_BYTES
    if may_differ and all(record[:wish] == records[0][:wish] for record in records):
        return False
    views = [
        json.loads(record[1:wish]) | {"selection": record[wish:][:16].hex(), "parts": record[wish:][16:].hex()}
        for record in records
    ]
    # Whom most of the others agree with is right; of two halves, the one with the first rank.
    right = max(views, key=lambda view: (views.count(view), -views.index(view)))
    odd = [rank for rank, view in enumerate(views) if view != right]
    differing = [name for name in right if any(views[rank].get(name) != right[name] for rank in odd)]
    unsaid = ("files", "load", DISK) if VERIFY in differing else ("files", "load")
    words = [_in_words(name, right, [views[rank] for rank in odd]) for name in differing if name not in unsaid]
    at = next(
        (
            f" (first in file number {number + 1})"
            for number, one in enumerate(right.get("files", []))
            if any(views[rank].get("files", [])[number : number + 1] != [one] for rank in odd)
        ),
        "",
    )
    ranks = f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd[:8]))}{', ...' * (len(odd) > 8)}"
    raise errors.RankDisagreementError(
        f"{right['load']}: the ranks of the group would load different things: {ranks} of {len(records)} "
        f"{'differs' if len(odd) == 1 else 'differ'} in {', '.join(words)}{at}"
    )


def _raise_failure(records: list[bytes], failure: BaseException | None) -> None:
    """Raise the error of a rank that has failed, if one has."""
    failed = [({"rank": rank} | json.loads(record[1:])) for rank, record in enumerate(records) if record[:1] == FAILED]
    if failed:
        # A rank leaves for a reason: raise that.
        causes = [one for one in failed if one["type"] != errors.RankLeftError.__name__] or failed
        raise errors.from_rank(**causes[0]) from failure


def _in_words(name: str, right: dict[str, Any], others: list[dict[str, Any]]) -> str:
    if name in ("file names", "file sizes", "headers", STATES, "selection", "parts", DISK):
        return name
    values = dict.fromkeys(str(view.get(name)) for view in others if view.get(name) != right[name])
    return f"{name} ({', '.join(values)} where the others have {right[name]})"


def failed_record(error: BaseException, load: str, rank: int | None = None, when: str = "before it began") -> bytes:
    """The message of a rank that failed: the error as JSON.

    Args:
        rank: whose error it is, unless it is the teller's, by the group's numbers.
        when: in words, for errors that are not ours.
    """
    limit = RECORD_BYTES // 4
    known = {name: getattr(error, name, None) for name in ("filename", "tensor", "offset", "errno")}
    filename = os.fsdecode(known["filename"]) if isinstance(known["filename"], (str, bytes)) else None
    tensor = known["tensor"] if isinstance(known["tensor"], str) else None
    try:
        message = str(error)
    except Exception as failed:  # of other people's exceptions anything may come
        pass_on(failed)
        message = ""
    if getattr(error, "rank", None) is not None:
        message = re.sub(r"^on rank \d+: ", "", message)  # which is about to be said again
    while True:
        fields = {
            "load": load[:limit],
            "type": type(error).__name__,
            "message": message[:limit],
            "filename": filename and filename[-limit:],
            "tensor": tensor and tensor[:limit],
            "offset": known["offset"] if isinstance(known["offset"], int) else None,
            "errno": known["errno"] if isinstance(known["errno"], int) else None,
            "when": when,
        } | ({} if rank is None else {"rank": rank})
        record = FAILED + json.dumps(fields, separators=(",", ":")).encode()
        if len(record) <= RECORD_BYTES:
            return record.ljust(RECORD_BYTES, b" ")
        limit //= 2  # characters that take several bytes each
