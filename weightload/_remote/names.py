"""Lists the names below an address, and reads index files, which say which names are a checkpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable

from weightload._base.addresses import WEB, below, is_hub, scheme_of, shown
from weightload._base.handlers import pass_on
from weightload._remote.failures import status_of, translated
from weightload._remote.hub import names_in
from weightload._remote.stores import library, place_of
from weightload._remote.transport import finish
from weightload.errors import CheckpointError, located

MOST_NAMES = 100_000
MOST_INDEX_BYTES = 100_000_000


def names_below(address: str, is_index: Callable[[str], bool], candidates: Iterable[str]) -> dict[str, bytes]:
    """The names that are directly below an address, of index files with their content (of all others empty).

    A web server is not asked for a list, of which there is no standard, but for each of the ``candidates``; and where
    it has an index, what that names is taken to be there.

    Raises:
        OSError, ReadError: the server cannot be asked.
        CheckpointError: there is no end of names, or of an index.
    """
    return finish(_names_below(address, is_index, candidates))


def content(address: str) -> bytes:
    """All of a small object, such as an index."""
    return finish(_content(address))


def shards_in(index: bytes) -> list[str]:
    """The names that an index has, if it is one; whether they are allowed is seen when it is read as a file."""
    try:
        given = json.loads(index)["weight_map"].values()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        pass_on(problem)
        return []
    return list(dict.fromkeys(name for name in given if isinstance(name, str)))[:MOST_NAMES]


async def _content(address: str) -> bytes:
    where, place = shown(address), place_of(address)
    try:
        answer = await library().get_async(place.store, place.path)
        size, data = answer.meta["size"], b""
        if size <= MOST_INDEX_BYTES:
            data = bytes(await answer.bytes_async())
    except Exception as error:
        raise translated(error, where) from None
    if size > MOST_INDEX_BYTES:
        raise located(CheckpointError(f"{where}: is too large for an index: {size} bytes"), where)
    return data


async def _exists(address: str) -> bool | BaseException:
    """Whether it is there, or why that cannot be told: stores may say "forbidden" of what is not there."""
    where, place = shown(address), place_of(address)
    try:
        await library().get_async(place.store, place.path, options={"range": (0, 1)})  # some answer no HEAD
    except Exception as error:
        failed = translated(error, where)
        if isinstance(failed, FileNotFoundError):
            return False
        if isinstance(failed, PermissionError):
            return failed
        if type(error).__name__ == "NotSupportedError" or status_of(error) == 416:
            return True  # it knows no ranges; it is empty
        raise failed from None
    return True


async def _names_below(address: str, is_index: Callable[[str], bool], candidates: Iterable[str]) -> dict[str, bytes]:
    on_the_web = scheme_of(address) in WEB
    if is_hub(address):
        names = dict.fromkeys(await asyncio.to_thread(names_in, address), b"")
    elif on_the_web:
        asked = list(candidates)
        there = await asyncio.gather(*(_exists(below(address, name)) for name in asked))
        names = dict.fromkeys((name for name, yes in zip(asked, there, strict=True) if yes is True), b"")
        refused = [answer for answer in there if isinstance(answer, BaseException)]
        if refused and not names:
            raise refused[0]
    else:
        names = dict.fromkeys(await _listed(address), b"")
    for name in [name for name in names if is_index(name)]:
        names[name] = await _content(below(address, name))
        for shard in shards_in(names[name]):
            if on_the_web or "/" in shard:  # which was not listed
                names.setdefault(shard, b"")
    return names


async def _listed(address: str) -> list[str]:
    where, place = shown(address), place_of(address)
    prefix = place.path.strip("/")
    try:
        found = await library().list_with_delimiter_async(place.store, prefix or None)
    except Exception as error:
        raise translated(error, where) from None
    paths = [one["path"] for one in found["objects"]]
    if len(paths) > MOST_NAMES:
        raise located(CheckpointError(f"{where}: more than {MOST_NAMES} objects are here; name the index"), where)
    return [path[len(prefix) :].lstrip("/") for path in paths]
