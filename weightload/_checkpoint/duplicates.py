"""Tensors of one name in several files of a load: which of them is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Literal

from weightload import _C
from weightload._base.addresses import is_address
from weightload._base.handlers import forgiven, pass_on
from weightload._base.printable import printable
from weightload._checkpoint.index import is_index, shards_of_tensors
from weightload.errors import CheckpointError, DuplicateTensor, located

Duplicates = Literal["error", "last"]


def require_duplicates(duplicates: str) -> None:
    """Raise ``ValueError`` for what says nothing about them."""
    if duplicates not in ("error", "last"):
        raise ValueError(f"duplicates {duplicates!r}: must be 'error' or 'last'")


Place = tuple[int, int]  # a file's number in the load, and a tensor's in the file


def without_repeats(
    files: Sequence[_C.CheckpointFile], selection: list[list[int]], duplicates: str, *, everything: bool = False
) -> list[list[int]]:
    """A selection with one tensor of each name: the one that an index beside the files gives the name to, else the
    last, or an error.

    Args:
        files: of the load, in its order.
        selection: numbers of tensors for each file.
        duplicates: ``"error"`` or ``"last"``, for names that no index decides.
        everything: whether the selection is of all tensors.

    Returns:
        The selection, the same if no name repeats.

    Raises:
        DuplicateTensor: a name repeats and nothing decides.
        CheckpointError: an index beside the files is bad.
    """
    if len(files) < 2:
        return selection
    dropped, undecided = _decide(files, None if everything else selection, duplicates)
    if undecided:
        raise _refusal_of(files, *next(iter(undecided.items())))
    return [
        [tensor for tensor in tensors if tensor not in drop] if drop else tensors
        for tensors, drop in zip(selection, dropped, strict=True)
    ]


def one_of_each(
    files: list[_C.CheckpointFile], duplicates: str, needed: Callable[[], Container[str]]
) -> list[_C.CheckpointFile]:
    """The files without the tensors that others of their name stand for; see ``without_repeats``.

    ``needed`` is asked for the names for which something must decide; others that nothing decides stay.
    """
    if len(files) < 2:
        return files
    dropped, undecided = _decide(files, None, duplicates)
    if undecided:
        names = needed()
        for name, places in undecided.items():
            if name in names:
                raise _refusal_of(files, name, places)
    return [
        file.with_tensors([number for number in range(len(file)) if number not in drop]) if drop else file
        for file, drop in zip(files, dropped, strict=True)
    ]


def _decide(
    files: Sequence[_C.CheckpointFile], selection: list[list[int]] | None, duplicates: str
) -> tuple[list[set[int]], dict[str, list[Place]]]:
    """The tensors of each file that are left out, and the names that nothing decides."""
    dropped: list[set[int]] = [set() for _ in files]
    undecided: dict[str, list[Place]] = {}
    repeated = _C.repeated_tensors(files, selection)
    owners = Owners([file.path for file in files]) if repeated else None
    for name, places in repeated:
        assert owners is not None
        kept = owners.decide(name, [file for file, _ in places])
        if kept is None and duplicates == "error":
            undecided[name] = places
            continue
        for number, (file, tensor) in enumerate(places):
            if number != (len(places) - 1 if kept is None else kept):
                dropped[file].add(tensor)
    return dropped, undecided


def _refusal_of(files: Sequence[_C.CheckpointFile], name: str, places: list[Place]) -> DuplicateTensor:
    return refusal(name, files[places[0][0]].path, files[places[1][0]].path)


def refusal(name: str, first: str, second: str) -> DuplicateTensor:
    """The error for a name that two files have."""
    place = f"{printable(second)}: tensor `{printable(name)}`"
    with forgiven(OSError):
        if first == second or os.path.samefile(first, second):
            what = f"{place} is there twice, as this file is listed twice, the first time as {printable(first)}"
            return located(DuplicateTensor(what), second, name)
    what = (
        f"{place}: an earlier file of the checkpoint, {printable(first)}, has a tensor of this name too, and no "
        "index says which is meant; if these are two models, pass the files of one; to load the last of each name, "
        'give the files to the iterator or to load_into with duplicates="last"'
    )
    return located(DuplicateTensor(what), second, name)


_remembered: dict[str, dict[str, str]] = {}
MOST_REMEMBERED = 16


def remember(folder: str, owners: dict[str, str]) -> None:
    """An index on a server: the file of each tensor, by the folder's and the files' addresses as shown.

    The credentials that it was read with are not known any more when a load asks.
    """
    _remembered.pop(folder, None)
    _remembered[folder] = owners
    while len(_remembered) > MOST_REMEMBERED:
        del _remembered[next(iter(_remembered))]


_copies: dict[str, str] = {}


def remember_copy(path: str, address: str) -> None:
    """A file is a copy of what is at an address, as shown: an index there speaks of it."""
    _copies[path] = address


class Owners:
    """The index files beside the files of a load, read when a name repeats."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = [_copies.get(path, path) for path in paths]
        self._keys: dict[int, str] = {}
        self._indexes: dict[str, list[tuple[dict[str, str], set[str]]]] = {}

    def decide(self, name: str, files: Sequence[int]) -> int | None:
        """Which of these files, counted in the list, an index takes the tensor from; None if none says.

        An index has a say between files that it names, all of them. One in the files' own folders comes first, then
        one in the folder above. Two that contradict each other say nothing.

        Raises:
            CheckpointError, OSError: an index beside the files is bad. One above is then not theirs.
        """
        keys = [self._key(file) for file in files]
        if len(set(keys)) < len(keys):
            return None
        folders = list(dict.fromkeys(map(os.path.dirname, keys)))
        above = list(dict.fromkeys(map(os.path.dirname, folders)))
        for candidates, theirs in ((folders, True), (above, False)):
            said = {
                keys.index(owner)
                for folder in candidates
                for owners, named in self._in_folder(folder, theirs)
                if named.issuperset(keys)
                for owner in (owners.get(name),)
                if owner in keys
            }
            if said:
                return said.pop() if len(said) == 1 else None
        return None

    def _key(self, file: int) -> str:
        """A path by which an index's words and the load's are compared: the file itself may be a link, as in a hub's
        cache, whose snapshots have the index."""
        if is_address(self._paths[file]):
            return self._paths[file]
        if file not in self._keys:
            folder, name = os.path.split(self._paths[file])
            self._keys[file] = os.path.join(os.path.realpath(folder), name)
        return self._keys[file]

    def _in_folder(self, folder: str, theirs: bool) -> list[tuple[dict[str, str], set[str]]]:
        if folder not in self._indexes:
            self._indexes[folder] = list(_read(folder, theirs))
        return self._indexes[folder]


def _read(folder: str, theirs: bool) -> Iterator[tuple[dict[str, str], set[str]]]:
    """Read every index in the folder. Yields the path of each tensor's shard by name, and all these paths."""
    if is_address(f"{folder}/"):
        owners = _remembered.get(folder)
        if owners is not None:
            yield owners, set(owners.values())
        return
    try:
        names = sorted(name for name in os.listdir(folder) if is_index(name) and not name.startswith("."))
    except OSError as failed:
        pass_on(failed)
        return  # a folder that may be passed through but not listed
    for name in names:
        try:
            shards = shards_of_tensors(Path(folder, name))
        except (CheckpointError, OSError) as failed:
            pass_on(failed)
            if theirs:
                raise
            continue
        keys = {shard: os.path.join(os.path.realpath(shard.parent), shard.name) for shard in set(shards.values())}
        yield {tensor: keys[shard] for tensor, shard in shards.items()}, set(keys.values())
