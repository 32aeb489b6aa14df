"""``rename=``: what tensors of a checkpoint are called where they go, and which box of a tensor there each fills."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import NamedTuple

from weightload import _C
from weightload._base.handlers import pass_on
from weightload._base.printable import printable
from weightload._checkpoint.duplicates import one_of_each
from weightload._parts import boxes
from weightload.errors import DuplicateTensor, located

Answer = str | tuple[str, tuple[slice | int, ...]] | None
Rename = Callable[[str], Answer] | Mapping[str, Answer]
"""Maps a tensor's name in the checkpoint to its new name, or to a name and the box of that tensor which it fills.
None: nothing is loaded of it. Names that a mapping lacks stay."""


class Piece(NamedTuple):
    """A tensor that fills a box of another."""

    target: str
    box: boxes.Box


@dataclasses.dataclass
class Renamed:
    """The tensors of renamed files."""

    pieces: dict[str, Piece] = dataclasses.field(default_factory=dict)
    """By their names in these files, which no other tensor has."""
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    """The names in the checkpoint of those that have another one now."""

    def by_target(self) -> dict[str, list[str]]:
        """Map each tensor of the target to those of the checkpoint that it is made of, with their boxes, in words."""
        found: dict[str, list[str]] = {}
        for name, source in self.sources.items():
            if name not in self.pieces:
                found[name] = [source]
        for name, piece in self.pieces.items():
            found.setdefault(piece.target, []).append(f"{self.sources.get(name, name)} {piece.box!r}")
        return {name: sorted(parts) for name, parts in found.items()}


Answers = Mapping[str, str | Piece | None]


def require_rename(rename: object) -> None:
    """Raise ``TypeError`` for what is neither a function nor a mapping."""
    if rename is not None and not callable(rename) and not isinstance(rename, Mapping):
        what = "rename must be a function of a tensor's name, or a mapping of names"
        raise TypeError(f"{what}; not {type(rename).__name__}")


def ask(rename: Rename, names: Iterable[str]) -> dict[str, str | Piece | None]:
    """The new name of each of these tensors.

    Raises:
        TypeError, ValueError: an answer that is none.
        Exception: what ``rename`` itself raises, with a note of the tensor's name.
    """
    mapping = rename if isinstance(rename, Mapping) else None
    answers: dict[str, str | Piece | None] = {}
    for name in names:
        try:
            if mapping is not None:
                answer: object = mapping.get(name, name)
            else:
                answer = rename(name)  # type: ignore[operator]
        except Exception as error:
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(f"raised by rename() of {printable(name)}")
            raise
        if answer is None or answer is name:
            answers[name] = None if answer is None else name
        else:
            answers[name] = _understood(answer, name)
    return answers


def _understood(answer: object, name: str) -> str | Piece:
    if isinstance(answer, str):
        return _encodable(answer, name)
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], str):
        what = "must be None, a name, or (name, box): each tensor goes to one place"
        raise TypeError(f"rename() of {printable(name)} {what}; not {repr(answer)[:80]}")
    try:
        box = boxes.parse(answer[1])
    except TypeError as error:
        pass_on(error)
        raise TypeError(f"rename() of {printable(name)}: {error}") from error
    except boxes.NoBoxError as error:
        raise ValueError(f"rename() of {printable(name)}: {error}") from error
    return Piece(_encodable(answer[0], name), box)


def _encodable(new: str, name: str) -> str:
    if not new.isascii():
        try:
            new.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"rename() of {printable(name)}: {new!r} is no text") from error
    return new


def rename_files(
    files: list[_C.CheckpointFile], selection: Sequence[Sequence[int]] | None, answers: Answers
) -> Renamed:
    """Put renamed files, of the selected tensors (None: all) that are to be loaded, in the place of files.

    A piece has a name of its own there, which says both of its names.

    Raises:
        DuplicateTensor: two tensors get one name, not both of them with a box.
    """
    renamed = Renamed()
    taken: dict[str, str] = {}  # what has a name
    filled: dict[str, str] = {}  # what fills a box of it
    for name, answer in answers.items():
        if answer is None:
            continue
        whole = isinstance(answer, str)
        new = answer if isinstance(answer, str) else answer.target
        mine, others = (taken, filled) if whole else (filled, taken)
        first = others.get(new, mine.setdefault(new, name))
        if new in others or (whole and first != name):
            raise _refusal(new, first, name)
        if whole and new != name:
            renamed.sources[new] = name
    keys: dict[str, str] = {}
    for name, answer in answers.items():
        if isinstance(answer, Piece):
            key = f"{answer.target} (from {name})"
            while key in taken or key in filled or key in renamed.pieces:
                key += "'"
            keys[name] = key
            renamed.pieces[key] = answer
            renamed.sources[key] = name
        elif answer is not None:
            keys[name] = answer
    files[:] = [
        _renamed(file, None if selection is None else selection[number], keys) for number, file in enumerate(files)
    ]
    return renamed


def _renamed(file: _C.CheckpointFile, numbers: Sequence[int] | None, keys: Mapping[str, str]) -> _C.CheckpointFile:
    names = file.names()
    some = [number for number in (range(len(names)) if numbers is None else numbers) if names[number] in keys]
    return file.with_tensors(some, [keys[names[number]] for number in some])


def _refusal(new: str, first: str, second: str) -> DuplicateTensor:
    what = (
        f"rename() gives the name {printable(new)} to two tensors, {printable(first)} and {printable(second)}; if they "
        "fill one tensor together, it must give each its box of it"
    )
    return located(DuplicateTensor(what), None, new)


def rename_opened(
    files: list[_C.CheckpointFile],
    rename: Rename,
    duplicates: str,
    wanted: Callable[[set[str]], Container[str]],
) -> Renamed:
    """Put renamed files, with one tensor of each name, in the place of files.

    ``wanted`` is asked which of a set of new names something must be decided for; see ``one_of_each``.
    """
    answers = ask(rename, list(dict.fromkeys(name for file in files for name in file.names())))

    def needed() -> set[str]:
        new = {name: a if isinstance(a, str) else a.target for name, a in answers.items() if a is not None}
        theirs = wanted(set(new.values()))
        return {name for name, target in new.items() if target in theirs}

    files[:] = one_of_each(files, duplicates, needed)
    return rename_files(files, None, answers)
