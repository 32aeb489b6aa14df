"""``cache=``: a folder with copies of what servers have, whole ones, each by its address and its state there.

FOLDER/ADDRESS.STATE/NAME is a copy, and FOLDER/.weightload-*.part one that is being written. ADDRESS and STATE are
digests: no address leads out of the folder, none meets another, and what is secret in one is not told.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Container, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import urlunsplit

from weightload import _C
from weightload._base.addresses import WEB, is_address, is_hub, scheme_of, shown, split
from weightload._base.handlers import forgiven, pass_on
from weightload._cache.copies import MOST_LEFT_OUT, Copies, Copy, Rank, sweep
from weightload._remote import hub
from weightload._remote.answers import identity
from weightload._remote.failures import status_of, translated
from weightload._remote.source import OPENED_AT_ONCE, open_addresses
from weightload._remote.stores import ENDPOINTS, library, place_of
from weightload._remote.transport import bare, finish
from weightload.errors import CacheError, ChecksumError, HeaderError, located

PART = re.compile(r"\.weightload-[0-9a-f-]+\.part")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
OTHER_NAME = "weights.safetensors"
COMMIT = re.compile(r"[0-9a-f]{40}")
PINNED = "pinned"
# Variables that say which store an address of a bucket is in.
ACCOUNTS = (*ENDPOINTS, "AZURE_STORAGE_ACCOUNT_NAME", "GOOGLE_SERVICE_ENDPOINT", "GOOGLE_BASE_URL")
# Names of a query's signature, which is another one each time that somebody signs. Azure's has names of two letters.
SIGNATURES = ("x-amz-", "x-goog-")
AZURES = {"sv", "ss", "srt", "sr", "sp", "st", "se", "sip", "spr", "sig", "skoid", "sktid", "skt", "ske", "sks", "skv"}

Agree = Callable[[str], list[str]]
"""Tells all ranks that share a load a text, and gives the texts of all, in their order; a collective call."""
FAILED = "failed"
SETTLED = 10  # seconds: times are whole ones, so what has just changed may change again without a sign


def digest(value: object, count: int) -> str:
    """Hash a value to ``count`` bytes, in hexadecimal digits."""
    return hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=count).hexdigest()


def key_of(address: str) -> str:
    """The first part of the name of a copy's folder: the same for what is one object."""
    around: list[str | None] = []
    if is_hub(address):
        plain, _ = hub.url_of(address)
    elif scheme_of(address) in WEB:
        parts = split(address)
        host = parts.netloc.rpartition("@")[2].lower()
        plain = urlunsplit((parts.scheme.lower(), host, parts.path, _unsigned(parts.query), ""))
    else:
        plain, around = address, [os.environ.get(name) for name in ACCOUNTS]
    return digest([plain, *around], 20)


def _unsigned(query: str) -> str:
    """Drop the signature from a query. The rest stays as it is written: a server may tell a plus from a space."""
    names = {piece.partition("=")[0] for piece in query.split("&")}
    signature = AZURES if {"sv", "sig"} <= names else set()
    kept = [
        piece
        for piece in query.split("&")
        if not piece.lower().startswith(SIGNATURES) and piece.partition("=")[0] not in signature
    ]
    return "&".join(kept)


def name_of_copy(address: str) -> str:
    """The name of a copy in its folder: the object's, if that is a plain one."""
    name = os.path.basename(shown(address))
    return name if PLAIN_NAME.fullmatch(name) else OTHER_NAME


def is_pinned(address: str) -> bool:
    """Whether an address always means the same bytes."""
    return is_hub(address) and COMMIT.fullmatch(hub.parse(address).revision or "") is not None


def state_of(same: tuple[object, ...]) -> str | None:
    """The second part of the name of a copy's folder, of an ``identity``; None if that does not tell a change."""
    size, tag, changed = same
    if tag is None and not 0 < _seconds(changed) < time.time() - SETTLED:
        return None
    return digest((size, tag, str(changed)), 12)


def _seconds(changed: Any) -> float:
    return 0 if changed is None else float(changed.timestamp())


class Cache:
    """A folder of copies, as a load uses it: first ``prepare``, then ``open``; in the end ``finish``, or ``close``.

    Args:
        folder: need not be there.
        fill: whether what the folder lacks is written to it.
        at_end: whether only in the end.
        agree: for the ranks that share the load and write its copies together; ``rank`` is this one's number, ``node``
            where it runs.
    """

    def __init__(
        self,
        folder: str,
        *,
        fill: bool,
        at_end: bool = False,
        agree: Agree | None = None,
        rank: int = 0,
        node: str = "",
    ) -> None:
        self._folder, self._fill, self._at_end = os.path.abspath(folder), fill, at_end
        self._agree, self._rank, self._node = agree, rank, node
        self._found: dict[str, _C.CheckpointFile] = {}
        self._used: set[str] = set()  # paths of the copies that the load may read
        self._failed: BaseException | None = None
        self._copies: Copies | None = None
        self._parts = 0
        self._token = secrets.token_hex(16)

    def prepare(self, paths: Sequence[str]) -> None:
        """Look for copies of what is at these paths. Ranks that share a load use a copy if all of them have it.

        Raises:
            GroupError: the ranks are not all here. All else is raised by ``open``, where the ranks hear of it.
        """
        mine = FAILED
        try:
            missing = self._look_for(paths)
            mine = f"{digest(sorted(self._found), 16)} {self._place()} {self._token}"
        except BaseException as error:  # the others must not wait for a rank that was interrupted
            self._fail(error)
        texts = self._agree(mine) if self._agree is not None else [mine]
        if FAILED in texts:
            return
        found, places, tokens = zip(*(text.split() for text in texts), strict=True)
        try:
            if len(set(found)) > 1:
                missing = True
                self._found.clear()
                if self._fill:
                    self._make_ready()
            if self._fill and missing:
                if len(set(places)) > 1:
                    raise ValueError(
                        "cache=: ranks that share a load must have one folder, on one node, to fill it together; with "
                        'strategy="independent" each fills its own'
                    )
                rank = Rank(self._rank, len(texts), tokens[0]) if self._agree is not None else None
                self._copies = Copies(self._at_end, rank)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._found.clear()
        self._failed = bare(error) if isinstance(error, Exception) else error

    def _look_for(self, paths: Sequence[str]) -> bool:
        """Find copies; whether there are not all."""
        addresses = list(dict.fromkeys(path for path in map(hub.local, paths) if is_address(path)))
        self._found = self._look(addresses)
        missing = len(self._found) < len(addresses)
        if self._fill and missing:
            self._make_ready()
        return missing

    def _place(self) -> str:
        """The folder's identity, if it is there: the same for all who see the same one."""
        with forgiven(OSError):
            status = os.stat(self._folder)
            return digest((self._node, status.st_dev, status.st_ino), 16)
        return digest(self._node, 16)

    def _make_ready(self) -> None:
        try:
            os.makedirs(self._folder, exist_ok=True)
            names = os.listdir(self._folder)
        except OSError as failed:
            pass_on(failed)
            error = located(CacheError(f"{self._folder}: cannot be cache=: {failed.strerror}"), self._folder)
            error.errno = failed.errno
            raise error from None
        for name in names:
            if PART.fullmatch(name):
                sweep(os.path.join(self._folder, name))

    def _look(self, addresses: Sequence[str]) -> dict[str, _C.CheckpointFile]:
        """The copies of these, opened, that are of what the servers have now."""
        try:
            names = os.listdir(self._folder)
        except (FileNotFoundError, NotADirectoryError) as missing:
            pass_on(missing)
            return {}
        keys = {address: key_of(address) for address in addresses}
        there = {name.partition(".")[0] for name in names}
        asked = [address for address in addresses if keys[address] in there]
        states = finish(_states(asked)) if any(not is_pinned(address) for address in asked) else [None] * len(asked)
        found = {}
        for address, same in zip(asked, states, strict=True):
            if isinstance(same, BaseException):
                raise bare(same)
            file = self._copy_of(address, same)
            if file is not None:
                found[address] = file
        return found

    def _path(self, address: str, state: str) -> str:
        return os.path.join(self._folder, f"{key_of(address)}.{state}", name_of_copy(address))

    def _copy_of(self, address: str, same: tuple[object, ...] | None) -> _C.CheckpointFile | None:
        """A copy, opened; None if there is none. One that is not whole is removed."""
        state = PINNED if is_pinned(address) else state_of(same) if same else None
        if state is None:
            return None
        path = self._path(address, state)
        try:
            # No link is followed, which may lead anywhere.
            if not stat.S_ISDIR(os.lstat(os.path.dirname(path)).st_mode):
                return None
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                return None
            if same is None or status.st_size == same[0]:
                opened = _C.open_files([os.fsencode(path)], 1)[0]
                self._used.add(path)
                return opened
        except HeaderError as bad:
            pass_on(bad)
        except (FileNotFoundError, NotADirectoryError) as missing:
            pass_on(missing)
            return None
        self.discard(path)
        return None

    def discard(self, path: str) -> None:
        """Remove a copy that is no good."""
        with forgiven(OSError):
            os.unlink(path)

    def open(self, addresses: Sequence[str]) -> list[_C.CheckpointFile]:
        """Open the copies, and of what there is none what the servers have.

        Raises:
            As ``open_addresses``; CacheError: the folder cannot be read or written. ValueError: ranks that share a
            load do not share the folder.
        """
        if self._failed is not None:
            raise self._failed
        missing = [address for address in dict.fromkeys(addresses) if address not in self._found]
        opened = self._found | dict(zip(missing, open_addresses(missing, self._begin), strict=True))
        self._found = {}
        return [opened[address] for address in addresses]

    def _begin(self, address: str, source: Any) -> None:
        """Have all written that a source gives."""
        if self._copies is None:
            return
        state = PINNED if is_pinned(address) else state_of(source.same)
        if state is None:
            what = (
                f"{source.where}: the server tells no tag, and no time or one of the last {SETTLED} s, so cache= could "
                "not see a change"
            )
            raise located(CacheError(what), source.where)
        self._parts += 1
        rank = self._copies.rank
        part = os.path.join(self._folder, f".weightload-{rank.token if rank else self._token}-{self._parts}.part")
        self._copies.add(Copy(self._path(address, state), part, source.where, source, rank))

    def skip_others(self, files: Sequence[_C.CheckpointFile], names: Container[str]) -> None:
        """Write no copies of files of which too little is read, of the tensors of these names."""
        for file in files if self._copies is not None else ():
            if file.is_remote and self._copies is not None:
                wanted = [number for number, name in enumerate(file.names()) if name in names]
                if file.size - file.data_begin - file.bytes_of(wanted) > file.size * MOST_LEFT_OUT:
                    self._copies.skip(file.remote)

    def finish(self) -> None:
        """The load is over: wait until its copies are whole.

        Raises:
            CacheError: one cannot be written. ReadError: the rest of one cannot be read.
        """
        if self._copies is not None:
            self._copies.finish()

    def close(self) -> None:
        """Stop; of what is not whole nothing is left."""
        self._found = {}
        if self._copies is not None:
            self._copies.close()

    def stop(self, error: BaseException) -> None:
        """Close it, as the load has failed.

        Raises:
            CacheError: that is why it has.
        """
        failure = self._copies.failure if self._copies is not None and self._agree is None else None
        self.close()
        if isinstance(error, ChecksumError) and error.filename in self._used:
            self.discard(error.filename)
        if failure is not None and isinstance(error, Exception):
            raise failure.with_traceback(None) from None

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
            else:
                self.stop(error)
        finally:
            self.close()


async def _states(addresses: Sequence[str]) -> list[Any]:
    """The ``identity`` of each object now; an exception where the server does not tell, None where nothing is there."""
    few = asyncio.Semaphore(OPENED_AT_ONCE)

    async def one(address: str) -> tuple[object, ...] | None:
        if is_pinned(address):
            return None
        async with few:
            return await _state(address)

    return await asyncio.gather(*map(one, addresses), return_exceptions=True)


async def _state(address: str) -> tuple[object, ...] | None:
    where, place = shown(address), place_of(address)
    try:
        try:  # not by HEAD, which a signature may not be for
            answer = await library().get_async(place.store, place.path, options={"range": (0, 1)})
        except Exception as error:
            if type(error).__name__ != "NotSupportedError":
                raise
            answer = await library().get_async(place.store, place.path)  # of which no more is read than the head
    except Exception as error:
        if status_of(error) == 416:  # it is empty
            return None
        raise translated(error, where) from None
    return identity(answer.meta)
