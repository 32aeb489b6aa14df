"""Fills what was matched: reads into memory of parameters, or beside it and copies; the loads of a load_into."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from weightload import _C
from weightload._base.handlers import pass_on
from weightload._base.load_stats import LoadStats
from weightload._base.paths import Path
from weightload._base.plain_torch import plainly
from weightload._group.agreement import Check
from weightload._into.replicas import Replicas, reads_apart
from weightload._into.state_dict import Match
from weightload._load import devices, progress
from weightload._load.start import Source, Started, fail_together, start
from weightload.errors import StateDictError, located

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


Look = Callable[[], None]
"""Called between any two tensors; ends the load by an exception."""


@dataclasses.dataclass
class Filled:
    """What a load did."""

    stats: dict[str, LoadStats]
    """By device; of what replicas have shared beside others, ``"cuda:0, replicas"``."""
    names: tuple[list[str], list[str]] | None = None
    """Missing and unexpected ones, where modules had a say in that."""


def fill(
    matched: Match,
    to: Iterable[torch.device],
    files: list[_C.CheckpointFile],
    paths: Sequence[Path],
    group: ProcessGroup | None = None,
    strategy: str = "independent",
    show_progress: bool | None = False,
    look: Look | None = None,
    replicas: Replicas | None = None,
    check: Check | None = None,
) -> Filled:
    """Load what was matched. Only code of modules that take part, and hooks, runs in the caller's torch modes."""
    filled, held, versions = _read(matched, to, files, paths, group, strategy, show_progress, look, replicas, check)
    if matched.turns is None:
        return filled

    @plainly
    def settle(name: str) -> None:
        """At the turn of a tensor's module, with what others made of it before."""
        names = matched.pieces.get(name, [name])
        changed = {n for n in names if n not in held and n in versions and versions[n] != matched.places[n]._version}
        if changed:
            held.update(_beside(changed, dataclasses.replace(matched, first=[]), files, paths, filled, progress.unseen))
        for each in names:
            if each in held:
                _put(each, held[each], matched.places[each])

    copied = matched.places.keys() | matched.pieces.keys() if matched.pieces else matched.places.keys()
    filled.names = matched.turns.take(held, settle, copied)
    return filled


@plainly
def _read(
    matched: Match,
    to: Iterable[torch.device],
    files: list[_C.CheckpointFile],
    paths: Sequence[Path],
    group: ProcessGroup | None,
    strategy: str,
    show_progress: bool | None,
    look: Look | None,
    replicas: Replicas | None,
    check: Check | None,
) -> tuple[Filled, dict[str, torch.Tensor], dict[str, int]]:
    """Do all but what needs the turns of modules.

    Returns:
        What was done, the tensors that wait for their turn, and the versions of what was filled.
    """
    sizes = matched.sizes
    filled = Filled({})
    given = matched.given()
    total = sum(sizes[name] for name in matched.places) + sum(sizes[name] for name in given)
    to = list(to)
    held: dict[str, torch.Tensor] = {}
    began = False
    try:
        with progress.bar(total, show_progress) as advance:
            try:
                if given or matched.first:
                    held = _beside(given.union(matched.first), matched, files, paths, filled, advance)
            except BaseException as error:
                if group is not None:
                    fail_together(error, group, strategy, paths, to[0])
                raise
            apart = bool(matched.dtensors) and reads_apart(matched.dtensors.values(), total)
            for what, device, names, ranks, how in _loads(to, matched, group, strategy, replicas):
                if replicas is not None and ranks is replicas.group:
                    replicas.expected = False
                try:
                    with _start(device, files, paths, matched, names, ranks, how, apart, check) as weights:
                        began = True
                        _take(weights, matched, held, advance, look)
                except BaseException as error:
                    if replicas is not None and ranks is replicas.group:
                        replicas.number_globally(error)
                    raise
                filled.stats[what] = weights.stats()
    finally:
        if began:
            # Bytes that changed behind autograd's back, perhaps not all of them. Inference tensors do without it.
            changed = [matched.places[name] for name in matched.direct] + matched.wholes
            torch.autograd.graph.increment_version([place for place in changed if not place.is_inference()])

    if matched.turns is None:
        # One over the other, as load_state_dict would.
        for name in matched.overlapping:
            _put(name, held[name], matched.places[name])
        return filled, {}, {}
    return filled, held, {name: place._version for name, place in matched.places.items() if not place.is_inference()}


def _beside(
    names: set[str],
    matched: Match,
    files: list[_C.CheckpointFile],
    paths: Sequence[Path],
    filled: Filled,
    advance: progress.Advance,
) -> dict[str, torch.Tensor]:
    """Tensors for the modules that take part, each rank's own, on the CPU as those of load_file are.

    Those that may not take a copy get theirs now, before anything else is written.
    """
    with start(Source.of(files, paths), devices.CPU, names, parts=matched.parts, backend="either") as weights:
        held = {}
        for name, tensor in weights:
            held[name] = tensor
            advance(matched.sizes[name])
    if not matched.places:
        filled.stats["cpu"] = weights.stats()
    for name in matched.first:
        _put(name, held.pop(name), matched.places[name])
    return held


@plainly
def devices_of(matched: Match) -> dict[torch.device, None]:
    """Where what was matched goes."""
    return dict.fromkeys(place.device for place in matched.places.values())


def shares(group: ProcessGroup | None, strategy: str) -> bool:
    """Whether bytes travel between ranks, in blocks of the loader's."""
    return group is not None and strategy != "independent"


def _loads(
    devices_here: Iterable[torch.device],
    matched: Match,
    group: ProcessGroup | None,
    strategy: str,
    replicas: Replicas | None,
) -> Iterator[tuple[str, torch.device, set[str], ProcessGroup | None, str]]:
    """The loads: what statistics call each, its device and names, and the ranks that share it, and how."""
    # First what is shared: a rank that fails by itself must not leave its replicas waiting.
    shared: set[str] = set()
    if replicas is not None:
        group, strategy = None, "independent"
        shared = {name for name in _names_on(replicas.device, matched) if name in replicas.names}
        yield f"{replicas.device}, replicas", replicas.device, shared, replicas.group, replicas.strategy
    for device in devices_here:
        own = _names_on(device, matched) - shared
        if own or replicas is None:
            yield str(device), device, own, group, strategy


def _names_on(device: torch.device, matched: Match) -> set[str]:
    return {name for name, place in matched.places.items() if place.device == device}.difference(matched.first)


def _start(
    device: torch.device,
    files: list[_C.CheckpointFile],
    paths: Sequence[Path],
    matched: Match,
    here: set[str],
    group: ProcessGroup | None,
    strategy: str,
    apart: bool,
    check: Check | None,
) -> Started:
    """A load of these names to one device."""
    in_order = [name for file in files for name in file.names() if name in here]
    places = [matched.places[name] if name in matched.direct else None for name in in_order]
    if shares(group, strategy):
        places = []
    elif device.type != "cpu":
        group = None
    return start(
        Source.of(files, paths),
        devices.resolve(device),
        here,
        group,
        strategy,
        places,
        parts=matched.parts,
        backend="either",
        apart=apart,
        check=check,
    )


def _take(
    weights: Started,
    matched: Match,
    held: dict[str, torch.Tensor],
    advance: progress.Advance,
    look: Look | None,
) -> None:
    """Let the load run, and put into place what could not be read there. What overlaps is held until all is read."""
    shown = advance is not progress.unseen
    if not shown and not matched.overlapping and len(matched.direct) == len(matched.places):
        # Nothing is left to do for tens of thousands of them, perhaps.
        if look is None:
            collections.deque(weights, maxlen=0)
        else:
            for _ in weights:
                look()
        return
    late = set(matched.overlapping)
    for name, tensor in weights:
        if name in late:
            held[name] = tensor
        elif name not in matched.direct:
            _put(name, tensor, matched.places[name])
        if shown:
            advance(matched.sizes[name])
        if look is not None:
            look()


def _put(name: str, tensor: torch.Tensor, place: torch.Tensor) -> None:
    """Copy as load_state_dict does, or as inference mode does where only that can."""
    with torch.inference_mode() if place.is_inference() else torch.no_grad():
        try:
            place.copy_(tensor.reshape(place.shape))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            pass_on(error)
            what = f"cannot load into {name!r}, a {type(place).__name__}: {error}\nOthers may be loaded by now"
            raise located(StateDictError(what), None, name) from error
