"""Fills what was matched: reads into memory of parameters, or beside it and copies; the loads of a load_into."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from weightload._base.handlers import pass_on
from weightload._base.load_stats import LoadStats
from weightload._base.plain_torch import plainly
from weightload._group.agreement import Check
from weightload._into.replicas import Replicas, reads_apart
from weightload._into.state_dict import Match
from weightload._into.together import Together, of_group
from weightload._load import devices, progress
from weightload._load.start import Reading, Sharers, Source, Started, Wanted, start
from weightload.errors import StateDictError, located

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclasses.dataclass
class Filling:
    """A load of what was matched."""

    matched: Match
    source: Source
    """Files that are open."""
    group: ProcessGroup | None = None
    strategy: str = "independent"
    together: Together = dataclasses.field(default_factory=lambda: of_group(None, "cpu"))
    replicas: Replicas | None = None
    check: Check | None = None
    stats: dict[str, LoadStats] = dataclasses.field(default_factory=dict)
    """By device; of what replicas have shared beside others, ``"cuda:0, replicas"``."""
    names: tuple[list[str], list[str]] | None = None
    """Missing and unexpected ones, where modules had a say in that."""

    def __post_init__(self) -> None:
        direct, replicas = self.matched.direct, self.replicas
        if shares(self.group, self.strategy):
            direct = set()
        elif replicas is not None:
            replicas.names = {piece for name in replicas.names for piece in self.matched.pieces.get(name, [name])}
            direct = direct - replicas.names
        self.matched = dataclasses.replace(self.matched, direct=direct)

    def run(self, show_progress: bool | None = False, first: torch.device = devices.CPU) -> None:
        """Load. Only code of modules that take part, and hooks, runs in the caller's torch modes.

        ``first``: where a rank with nothing to load agrees on that with others, or says so.
        """
        held, versions = self._read(show_progress, first)
        matched = self.matched
        if matched.turns is None:
            return

        @plainly
        def settle(name: str) -> None:
            """At the turn of a tensor's module, with what others made of it before."""
            names = matched.pieces.get(name, [name])
            changed = {
                n for n in names if n not in held and n in versions and versions[n] != matched.places[n]._version
            }
            if changed:
                held.update(self._beside(changed, progress.unseen))
            for each in names:
                if each in held:
                    _put(each, held[each], matched.places[each])

        copied = matched.places.keys() | matched.pieces.keys() if matched.pieces else matched.places.keys()
        self.names = matched.turns.take(held, settle, copied)

    @plainly
    def _read(self, show_progress: bool | None, first: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Do all but what needs the turns of modules.

        Returns:
            The tensors that wait for their turn, and the versions of what was filled.
        """
        matched, sizes = self.matched, self.matched.sizes
        given = matched.given()
        total = sum(sizes[name] for name in matched.places) + sum(sizes[name] for name in given)
        held: dict[str, torch.Tensor] = {}
        began = False
        try:
            with progress.bar(total, show_progress) as advance:
                if given or matched.first:
                    held = self._beside(given.union(matched.first), advance)
                # Those that may not take a copy get theirs now, before anything else is written.
                for name in matched.first:
                    _put(name, held.pop(name), matched.places[name])
                apart = bool(matched.dtensors) and reads_apart(matched.dtensors.values(), total)
                for what, device, names, ranks, how in self._loads(first):
                    with self._numbered(ranks), self._start(device, names, ranks, how, apart) as weights:
                        began = True
                        self._take(weights, held, advance)
                    self.stats[what] = weights.stats()
        finally:
            if began:
                # Bytes that changed behind autograd's back, perhaps not all of them. Inference tensors do without it.
                changed = [matched.places[name] for name in matched.direct] + matched.wholes
                torch.autograd.graph.increment_version([place for place in changed if not place.is_inference()])

        if matched.turns is None:
            # One over the other, as load_state_dict would.
            for name in matched.overlapping:
                _put(name, held[name], matched.places[name])
            return {}, {}
        return held, {name: place._version for name, place in matched.places.items() if not place.is_inference()}

    def _beside(self, names: set[str], advance: progress.Advance) -> dict[str, torch.Tensor]:
        """Tensors for the modules that take part, each rank's own, on the CPU as those of load_file are."""
        held = {}
        with start(self.source, devices.CPU, Wanted(names, self.matched.parts), reading=Reading("either")) as weights:
            for name, tensor in weights:
                held[name] = tensor
                advance(self.matched.sizes[name])
        if not self.matched.places:
            self.stats["cpu"] = weights.stats()
        return held

    def _loads(self, first: torch.device) -> Iterator[tuple[str, torch.device, set[str], ProcessGroup | None, str]]:
        """The loads: what statistics call each, its device and names, and the ranks that share it, and how."""
        group, strategy, replicas = self.group, self.strategy, self.replicas
        to = dict.fromkeys(place.device for place in self.matched.places.values())
        if group is not None or replicas is not None:
            to.setdefault(first)
        # First what is shared: a rank that fails by itself must not leave its replicas waiting.
        shared: set[str] = set()
        if replicas is not None:
            group, strategy = None, "independent"
            shared = {name for name in self._names_on(replicas.device) if name in replicas.names}
            yield f"{replicas.device}, replicas", replicas.device, shared, replicas.group, replicas.strategy
        for device in to:
            own = self._names_on(device) - shared
            if own or replicas is None:
                yield str(device), device, own, group, strategy

    def _names_on(self, device: torch.device) -> set[str]:
        here = {name for name, place in self.matched.places.items() if place.device == device}
        return here.difference(self.matched.first)

    def _numbered(self, ranks: ProcessGroup | None) -> contextlib.AbstractContextManager[None]:
        if self.replicas is None or ranks is not self.replicas.group:
            return contextlib.nullcontext()
        return self.replicas.numbered_globally()

    def _start(
        self, device: torch.device, here: set[str], group: ProcessGroup | None, strategy: str, apart: bool
    ) -> Started:
        """A load of these names to one device."""
        matched, target = self.matched, devices.resolve(device)
        in_order = [name for file in self.source.open() for name in file.names() if name in here]
        places = [matched.places[name] if name in matched.direct else None for name in in_order]
        if target.type != "cpu" and not shares(group, strategy):
            group = None
        if group is not None:
            self.together.waits = None  # they agree in there
        return start(
            self.source,
            target,
            Wanted(here, matched.parts),
            Sharers(group, strategy, check=self.check),
            Reading("either", apart=apart),
            places,
        )

    def _take(self, weights: Started, held: dict[str, torch.Tensor], advance: progress.Advance) -> None:
        """Let the load run, and put into place what could not be read there; but what overlaps when all is read."""
        matched, look = self.matched, None if self.together.alone else self.together.look
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


def shares(group: ProcessGroup | None, strategy: str) -> bool:
    """Whether bytes travel between ranks, in blocks of the loader's."""
    return group is not None and strategy != "independent"


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
