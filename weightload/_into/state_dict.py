"""Which tensor of a checkpoint goes where in a target: names, shapes, dtypes, memory, tied weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from weightload import _C
from weightload._base.dtypes import TORCH_DTYPES, torch_shape
from weightload._base.plain_torch import plainly
from weightload._base.printable import printable
from weightload._into.fused_places import FusedPlaces, fuse
from weightload._into.own_loading import Turns, Walk
from weightload._into.places import READ_ONLY, CopyTrials, Place, Spans, keys, look
from weightload._load.renaming import Renamed
from weightload._parts.shards import NOTHING, Dealt, Known, Part, bytes_of_part
from weightload.errors import StateDictError, TensorError, located

# Bytes of a tensor for which a request of its own is no loss: what comes in the time of one, at 1 Gbit/s.
LEAST_REQUEST = 2 << 20

Target = torch.nn.Module | Mapping[str, torch.Tensor]
# The files' tensors by name: each one's name, dtype, shape, and where its bytes begin and end.
Here = Mapping[str, tuple[str, str, tuple[int, ...], int, int]]
# A tensor and what is wrong with it.
Problems = list[tuple[str, str]]


@dataclasses.dataclass
class Match:
    """The outcome of matching."""

    places: dict[str, torch.Tensor]
    """Where each tensor that will be read goes; of tied names, the last. Of a DTensor, its memory on this rank."""
    parts: dict[str, Part]
    """Which part of the file's tensor goes there; of the others, all."""
    wholes: list[torch.Tensor]
    """The DTensors whose memory it is."""
    dtensors: dict[str, Dealt]
    """All the target's DTensors: how they are dealt out."""
    direct: set[str]
    """Names whose bytes can be read straight into that memory."""
    overlapping: list[str]
    """Names that share memory with others, in the target's order: the last written counts."""
    first: list[str]
    """Names of tensors that may turn out not to take a copy: they get theirs before anything else is written."""
    loaded: list[str]
    missing: list[str]
    absent: list[str]
    """``missing``, and tied names that others stand for."""
    unexpected: list[str]
    turns: Turns | None
    """The tensors left to modules that take part in their own loading: only these know what they miss."""
    sizes: dict[str, int]
    """Bytes of each tensor of the files, or of the part of it that is read."""
    tied: dict[str, object]
    """A key for every name of the target, equal for tied ones."""
    pieces: dict[str, list[str]]
    """For each tensor of the target that others fill together, names of those that are read. ``places``, ``parts``,
    ``direct``, ``overlapping`` and ``sizes`` have theirs; ``loaded`` and the other lists have the target's."""

    def given(self) -> set[str]:
        """Names of the tensors that go to modules that take part."""
        return {name for names in self.turns.given.values() for name in names} if self.turns else set()

    def without_tied(self, missing: Iterable[str]) -> list[str]:
        """The names of these that no name of the checkpoint is tied to."""
        alive: dict[object, set[str]] = {}
        for name in self.loaded:
            alive.setdefault(self.tied.get(name), set()).add(name)
        # A tensor that is there and that its module calls missing all the same is no stand-in for itself.
        return [name for name in missing if name not in self.tied or not alive.get(self.tied[name], set()) - {name}]


def wanted_names(target: Target, files: Sequence[_C.CheckpointFile]) -> set[str]:
    """The names of the files that the target has a use for."""
    return wanted_of(target, {name for file in files for name in file.names()})


def wanted_of(target: Target, names: Collection[str]) -> set[str]:
    """The names of these that the target has a use for."""
    walk = _walk(target, names)
    parts = tuple(walk.parts)
    return {name for name in names if name in walk.tensors or (parts and name.startswith(parts))}


def match(target: Target, files: Sequence[_C.CheckpointFile], strict: bool, renamed: Renamed | None = None) -> Match:
    """Decide where every tensor of the files goes, before any byte of them is read. ``renamed``: where they are.

    Modules of FSDP must be back to their shards: ``shards.go_back_to_shards``.

    Raises:
        StateDictError: shapes differ, or names do under ``strict``, or tensors cannot be filled. All are named.
        TensorError: torch lacks the dtype of a tensor that is wanted.
        TypeError: the target is neither a module nor a mapping of tensors.
    """
    here = {tensor[0]: tensor for file in files for tensor in file.tensors()}
    pieces = renamed.pieces if renamed else {}
    walk = _walk(target, {pieces[name].target if name in pieces else name for name in here} if pieces else here.keys())
    made = walk.made_on_the_fly()  # by the user's code, in the user's modes
    return _match(target, walk, made, here, files, strict, renamed or Renamed())


@plainly
def _match(
    target: Target,
    walk: Walk,
    made: Sequence[str],
    here: Here,
    files: Sequence[_C.CheckpointFile],
    strict: bool,
    renamed: Renamed,
) -> Match:
    tensors = walk.tensors
    known: Known = {}
    with torch.no_grad():
        places = {name: look(tensor, known) for name, tensor in tensors.items()}
        theirs = {name: look(tensor, known) for name, tensor in walk.theirs.items()}
    fused: FusedPlaces | None = None
    there: Collection[str] = here  # by their names in the target
    if renamed.pieces:
        fused = fuse(renamed, here, tensors, places)
        tensors, places, there = fused.tensors, places | fused.places, fused.names(here)
    given, unexpected = _others(walk, there)
    _require_dtypes(here, tensors, given, files)

    tied = keys(places | theirs if theirs else places)
    if fused:
        tied.update(fused.keys(tied, places))
    # The last of tied names in the target's order wins, as with load_state_dict; the others are not read.
    last = {tied[name]: name for name in tensors if name in here}
    wanted = (name for name in here if name in tensors and last[tied[name]] == name)
    read = {name: places[name] for name in wanted if places[name].part is not NOTHING}
    spanned = fused.whole(read, places) if fused else read
    spans = Spans(spanned | theirs if theirs else spanned)
    mixed = spans.overlapping()
    if fused:
        mixed = {name for name in tensors if fused.name(name) in mixed}
    direct = {
        name
        for name, place in read.items()
        if place.direct and name not in mixed and place.tensor.dtype == TORCH_DTYPES[here[name][1]]
    }
    # Small ones of a server's come with their neighbours, in one request.
    asked = {name for file in files if file.is_remote for name in file.names()}
    direct -= {name for name in direct & asked if here[name][4] - here[name][3] < LEAST_REQUEST}

    alive = {key for name, key in tied.items() if name in here}
    if fused:
        alive.update(tied[name] for name in fused.filled() if name in tied)
    absent = [name for name in tensors if name not in here and name not in walk.excused]
    if fused and fused.partly:
        lacking = fused.partly.keys() | set(absent)
        absent = [name for name in walk.tensors if name in lacking]
    absent += walk.extra.values()
    missing = [name for name in absent if name not in tied or tied[name] not in alive]
    surplus = [name for names in unexpected.values() for name in names]
    untried: list[str] = []
    problems = [(name, f"{name!r} {place.problem}") for name, place in places.items() if place.problem]
    # The module that takes part may know a way out of other problems.
    problems += [(name, f"{name!r} {place.problem}") for name, place in theirs.items() if place.hopeless()]
    whole = "cannot be loaded into: it is a DTensor in a module that takes part in its own loading"
    problems += [(name, f"{name!r} {whole}") for name, place in theirs.items() if place.whole is not None]
    on_the_fly = "is made by the module's state_dict on the fly; use load_state_dict"
    problems += [(name, f"{name!r} {on_the_fly}") for name in made]
    alone = {name: tensor for name, tensor in tensors.items() if name not in fused.owners} if fused else tensors
    problems += _differing_shapes(here, alone, renamed.sources)
    if fused:
        problems += fused.problems
        boxed = "cannot be loaded: no boxes can be filled of a module that takes part in its own loading"
        home = {name for names in given.values() for name in names}
        problems += [(name, f"{name!r} {boxed}") for name, owner in fused.owners.items() if owner in home]
    if not problems:
        problems, untried = _uncopyable(here, {name: read[name] for name in read.keys() - direct})
        problems += [(name, f"{name!r} {READ_ONLY}") for name in spans.read_only()]
    # Hooks may forgive names, and are asked after the loading.
    strictly = differing_names(missing, surplus) if strict and not walk.forgiving else []
    if strictly and fused:
        strictly += [fused.partly[name] for name in missing if name in fused.partly]
    if problems or strictly:
        raise refusal(target, files, [words for _, words in problems] + strictly, next(iter(problems), (None,))[0])
    sizes = {name: end - begin for name, _, _, begin, end in here.values()}
    for name, place in read.items():
        if place.dealt is not None and not fused:
            sizes[name] = sizes[name] * place.tensor.numel() // max(place.dealt.example.numel(), 1)
        elif place.part is not None:
            sizes[name] = bytes_of_part(sizes[name], place.part, here[name][1], here[name][2])
    turns = None
    if walk.parts or walk.hooked:
        turns = Turns(walk, given, unexpected, set(absent), strict)
    everywhere = {name for names in given.values() for name in names}
    loaded = [name for name in here if name in tensors or name in everywhere]
    pieces = fused.pieces(read) if fused else {}
    if fused:
        loaded = [name for name in fused.names(loaded) if name not in fused.partly]
        sizes.update(dict.fromkeys(fused.elsewhere(places), 0))
        for name, owner in fused.owners.items():
            sizes[owner] = sizes.get(owner, 0) + sizes[name]
    return Match(
        places={name: place.tensor for name, place in read.items()},
        parts={name: place.part for name, place in read.items() if place.part is not None},
        wholes=[place.whole for place in read.values() if place.whole is not None],
        dtensors={name: dealt for name in walk.tensors if (dealt := places[name].dealt) is not None},
        direct=direct,
        overlapping=[name for name in tensors if name in mixed and name in read],
        first=[name for name in untried if name not in mixed],
        loaded=loaded,
        missing=missing,
        absent=absent,
        unexpected=[name for name in there if name in set(surplus)] if surplus else [],
        turns=turns,
        sizes=sizes,
        tied=tied,
        pieces=pieces,
    )


def refusal(
    target: Target, files: Sequence[_C.CheckpointFile], problems: Iterable[str], tensor: str | None = None
) -> StateDictError:
    """The error that says why files do not go into a target."""
    source = printable(files[0].path) if len(files) == 1 else f"{len(files)} files"
    path = files[0].path if len(files) == 1 else None if tensor is None else _path_of(tensor, files)
    lines = "\n\t".join(problems)
    return located(StateDictError(f"cannot load {source} into {type(target).__name__}:\n\t{lines}"), path, tensor)


def _path_of(tensor: str, files: Sequence[_C.CheckpointFile]) -> str | None:
    return next((file.path for file in files if tensor in file.names()), None)


def differing_names(missing: Collection[str], unexpected: Collection[str]) -> list[str]:
    """In words, what ``strict`` minds."""
    words = (("missing from", missing), ("unexpected in", unexpected))
    return [f"{what} the checkpoint: " + ", ".join(map(printable, names)) for what, names in words if names]


def _walk(target: Target, names: Collection[str]) -> Walk:
    """The targets of a load."""
    if isinstance(target, torch.nn.Module):
        return Walk.of(target, names)
    if not isinstance(target, Mapping):
        raise TypeError(f"cannot load into a {type(target).__name__}: must be a module or a mapping of tensors")
    for name, tensor in target.items():
        if not isinstance(name, str):
            raise TypeError(f"cannot load into {name!r}: must be a name (str), not a {type(name).__name__}")
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"cannot load into {name!r}, a {type(tensor).__name__}: must be a tensor")
    return Walk(tensors=dict(target))


def _others(walk: Walk, names: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Names that are none of the tensors': those that parts get, and those that modules do not expect; by prefix."""
    given: dict[str, list[str]] = {prefix: [] for prefix in walk.parts}
    unexpected: dict[str, list[str]] = {}
    for name in names:
        if name not in walk.tensors and (home := walk.home_of(name)):
            prefix, is_part = home
            (given if is_part else unexpected).setdefault(prefix, []).append(name)
    return given, unexpected


def _require_dtypes(
    here: Here, tensors: Collection[str], given: Mapping[str, Sequence[str]], files: Sequence[_C.CheckpointFile]
) -> None:
    wanted = {name for names in given.values() for name in names}
    for name, dtype, _, _, _ in here.values():
        if dtype not in TORCH_DTYPES and (name in tensors or name in wanted):
            path = _path_of(name, files)
            words = f"torch has no dtype for {dtype}, that of tensor `{printable(name)}`"
            raise located(TensorError(f"{printable(path or '')}: {words}"), path, name)


def _differing_shapes(here: Here, tensors: Mapping[str, torch.Tensor], sources: Mapping[str, str]) -> Problems:
    problems = []
    for name, dtype, shape, _, _ in here.values():
        if name not in tensors or torch.nn.parameter.is_lazy(tensor := tensors[name]) or tensor.is_nested:
            continue
        theirs, ours = torch_shape(dtype, shape), tensor.shape
        # Take what load_state_dict takes: checkpoints of before torch 0.4 have vectors of one element for scalars.
        if theirs != ours and not (ours == () and theirs == (1,)):
            words = f"the checkpoint has {theirs}, the target {tuple(ours)}"
            source = f" (from {printable(sources[name])})" if name in sources else ""
            problems.append((name, f"size mismatch for {printable(name)}{source}: {words}"))
    return problems


def _uncopyable(here: Here, copied: Mapping[str, Place]) -> tuple[Problems, list[str]]:
    """Describes tensors that cannot be made of the file's dtype; and names those of which that is not known."""
    trials = CopyTrials()
    problems = []
    for name in [name for name in here if name in copied]:
        if words := trials.problem(name, copied[name], TORCH_DTYPES[here[name][1]]):
            problems.append((name, f"{name!r} {words}"))
    return problems, trials.untried
