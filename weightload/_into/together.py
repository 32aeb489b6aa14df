"""How the ranks that load into one model begin and end together: what fails on one of them is raised on all."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from weightload import _C
from weightload._base.handlers import pass_on
from weightload._base.plain_torch import plainly
from weightload._group.agreement import FAILED, agreed_record, check, digest, failed_record, was_told
from weightload._group.ranks import group_of_dimension, has_cpu_backend, is_one_node, world_is_one_node
from weightload._into.places import PLAIN
from weightload._load import devices
from weightload._load.ring import make_target
from weightload._parts.shards import Dealt, is_dtensor
from weightload._verify.checking import Ranks
from weightload.errors import GroupError, WeightLoadError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LOOK_SECONDS = 1.0
"""How often a rank that is loading looks whether another has failed: it asks the store of torch.distributed."""

# In how many rounds each set of ranks that have loaded together met. The number is the same on all of them.
_rounds: collections.Counter[str] = collections.Counter()


class OthersFailed(Exception):
    """Another rank has failed: what to raise, the last round says."""


class Together:
    """The ranks that load together, of which each reads for itself, or which share the reading.

    They meet in rounds: one before the load, if what is compared there is not compared otherwise, and one after it. In
    a round every rank tells all others that it is ready, or why it failed, over each of ``groups`` in turn: those of
    the dimensions of a mesh, after the last of which a rank has heard of all. A round in which one failed is the last.

    A context manager: the load runs in it. What is raised there is told where the others wait for this rank, and its
    end is the round after the load.

    Args:
        groups: the ranks, this one among them; none: it loads alone.
        kind: the type of the devices between which records travel if a group has no backend for CPUs.
        ranks: all of them, by their numbers in the default group.
        is_mesh: whether errors call ranks by those numbers, and not by the first group's.

    Attributes:
        load: what errors call the load.
        ranks: their number.
        waits: tells ranks of a failure of this one that wait for an agreement with it, and not for a round.
    """

    waits: Callable[[BaseException], None] | None = None

    def __init__(self, groups: Sequence[ProcessGroup], kind: str, ranks: Sequence[int], is_mesh: bool) -> None:
        self.load, self.ranks = "load_into", len(ranks)
        self._members = list(ranks)
        self._groups, self._kind, self._is_mesh = groups, kind, is_mesh
        self._has_begun = self._is_over = False
        self._name = digest(map(str, ranks))
        self._key = f"weightload/failed/{self._name}/{_rounds[self._name]}" if groups else ""
        self._due = time.monotonic() + LOOK_SECONDS

    @property
    def alone(self) -> bool:
        """Whether this process loads alone, as far as is known."""
        return not self._groups

    def checking(self, strategy: str) -> Ranks | None:
        """These ranks, for a check of their files, of which the round after the load has the verdict."""
        if not self._groups:
            return None
        if self._is_mesh and len(self._members) < torch.distributed.get_world_size():
            return Ranks(0, 1, one_node=False)  # other ranks may be in other meshes, too: each checks all files
        number = self._members.index(torch.distributed.get_rank())
        one_node = world_is_one_node() if self._is_mesh else is_one_node(self._groups[0])
        return Ranks(number, len(self._members), one_node, first_asks=not self._is_mesh and strategy == "broadcast")

    def begin(self, same: Mapping[str, Any], failure: BaseException | None = None) -> None:
        """The round before the load: ``same`` must be the same on all ranks, or ``failure`` says that this one failed.

        Raises:
            RankDisagreementError: it is not.
            GroupError: a rank cannot be reached.
            Exception: what a rank raised, on every rank.
        """
        self._has_begun = True
        self.waits = None
        try:
            self._round(same, failure, "before it began")
        finally:
            failure = None  # its traceback has this frame in it

    def end(self, failure: BaseException | None = None) -> None:
        """The round after the load. Raises as ``begin``."""
        try:
            self._round({"stage": "end of the load"}, failure, "")
            if isinstance(failure, OthersFailed):
                raise GroupError(f"{self.load}: a rank said that it failed, and then that it did not") from failure
        finally:
            failure = None  # its traceback has this frame in it

    def __enter__(self) -> Together:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        told = failure
        del trace
        try:
            if failure is not None and self.waits is not None:
                try:
                    self.waits(failure)
                except BaseException as heard:
                    told = heard
            if told is None:
                self.end()
            elif self._should_hear(told):
                self._shout(told)
                self.end(told)
            if told is not None and told is not failure:
                raise told
        finally:
            failure = told = None  # their tracebacks have this frame in them

    def _should_hear(self, failure: BaseException) -> bool:
        """Whether the other ranks are waiting to hear of this failure."""
        if not self._groups or self._is_over or (was_told(failure) and not self._has_begun):
            return False
        # A rank that cannot be reached will not come to a round, either. The others find out as this one did.
        return not (type(failure) is GroupError and failure.rank is None)

    def _shout(self, failure: BaseException) -> None:
        """Have ranks that are still loading stop."""
        if self._key and isinstance(failure, Exception):
            with contextlib.suppress(Exception):  # the round will tell them
                _store().set(self._key, "1")

    def look(self) -> None:
        """Raise ``OthersFailed`` if another rank has failed. Asks every ``LOOK_SECONDS``; costs little in between."""
        if not self._key or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + LOOK_SECONDS
        try:
            failed = _store().check([self._key])
        except Exception as error:
            pass_on(error)
            self._key = ""  # no store, or none that can be asked: the round will tell
            return
        if failed:
            raise OthersFailed

    @plainly
    def _round(self, same: Mapping[str, Any], failure: BaseException | None, when: str) -> None:
        if not self._groups:
            if failure is not None:
                raise failure
            return
        mine = None if isinstance(failure, OthersFailed) else failure
        heard: BaseException | None = None
        # In a mesh, the caller does not know a rank by its number in a group.
        own_rank = torch.distributed.get_rank() if self._is_mesh else self._groups[0].rank()
        rank = own_rank
        if isinstance(mine, (WeightLoadError, OSError)):  # of replicas, one that has failed is known already
            known: object = getattr(mine, "rank", None)
            rank = known if type(known) is int else own_rank
        record = agreed_record("load_into", same) if mine is None else failed_record(mine, self.load, rank, when)
        try:
            for group in self._groups:
                try:
                    check(self._exchange(group, record, mine), mine)
                except BaseException as error:
                    if heard is None or not isinstance(error, Exception):
                        heard = error
                    if not isinstance(error, Exception):
                        mine = error  # the others are told, without waiting for them
                    if record[:1] != FAILED:
                        record = failed_record(error, self.load, getattr(error, "rank", None), when)
            if heard is None:
                return
            # When a rank is interrupted while it waits, the others think that all is well: the next round tells them.
            self._is_over = isinstance(heard, Exception) or heard is failure
            if (
                mine is not None
                and getattr(heard, "rank", None) == rank == own_rank
                and not isinstance(heard, type(mine))
            ):
                raise mine  # of a class that only its own rank knows
            raise heard
        finally:
            self._count_round()
            # Their tracebacks have this frame in them.
            failure = mine = heard = None

    def _count_round(self) -> None:
        """Ranks that take part in the same rounds have the same key."""
        _rounds[self._name] += 1
        self._key = f"weightload/failed/{self._name}/{_rounds[self._name]}"

    def _exchange(self, group: ProcessGroup, record: bytes, failure: BaseException | None) -> list[bytes]:
        target, device = None, devices.CPU
        if not has_cpu_backend(group):
            device = devices.resolve(self._kind)
            target = make_target(device, 0, 1)
        try:
            part = _C.Group(group, target, str(device), _C.Strategy.independent, self.load)
            try:
                if failure is not None and not isinstance(failure, Exception):
                    with contextlib.suppress(Exception):
                        part.tell(record)
                    raise failure
                return part.agree(record, False)
            finally:
                part.close()
        finally:
            if target is not None:
                target.close()


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


@plainly
def of_meshes(tensors: Iterable[torch.Tensor]) -> Together:
    """The ranks of the meshes of DTensors; of those that this process has no part in, none."""
    meshes: dict[int, Any] = {}
    for tensor in tensors:
        if type(tensor) not in PLAIN and is_dtensor(tensor):
            mesh = _spec(tensor).mesh
            meshes[id(mesh)] = mesh
    ranks: set[int] = set()
    groups: dict[str, ProcessGroup] = {}
    for mesh in meshes.values():
        if mesh.get_coordinate() is None:
            continue
        ranks.update(mesh.mesh.flatten().tolist())
        groups.update((group.group_name, group) for group in _groups_of(mesh))
    # One group rather than several, if it is there in any case.
    world = torch.distributed.group.WORLD
    if groups and len(ranks) == torch.distributed.get_world_size() and has_cpu_backend(world):
        groups = {"": world}  # type: ignore[dict-item]
    kind = next((mesh.device_type for mesh in meshes.values()), "cpu")
    return Together(list(groups.values()), kind, sorted(ranks), is_mesh=True)


def of_group(group: ProcessGroup | None, kind: str) -> Together:
    """The ranks of a group, if they are several."""
    if group is None or group.size() == 1:
        return Together([], kind, [], is_mesh=False)
    return Together([group], kind, torch.distributed.get_process_group_ranks(group), is_mesh=False)


def _groups_of(mesh: Any) -> Iterable[ProcessGroup]:
    """The groups of a mesh's dimensions that ranks can speak in."""
    for dimension in range(mesh.ndim):
        group = group_of_dimension(mesh, dimension)
        if group is not None and group.size() > 1:
            yield group


@plainly
def of_dtensors(
    tensors: Mapping[str, Dealt], ranks: int, sources: Mapping[str, Sequence[str]], absent: Collection[str]
) -> dict[str, str]:
    """Terms of DTensors that must be the same on all ranks that load them: names, shapes, and how they are dealt out.

    Args:
        tensors: DTensors by name. Those of which only some of the ranks have a part are nothing to the others: experts
            that are other ones on other ranks.
        ranks: how many load together.
        sources: what of the checkpoint those are made of, in words, that have another name there.
        absent: names of which it has nothing, or not all.
    """
    known: dict[int, tuple[str, str] | None] = {}  # layers are alike, and a mesh answers slowly
    names, shapes, ways = [], [], []
    for name, dealt in tensors.items():
        if id(dealt) not in known:
            spec = _spec(dealt.example)
            # Do not compare its ranks: in a part of a mesh (``mesh["dp"]``) they differ from rank to rank.
            mesh = repr((tuple(spec.mesh.shape), spec.mesh.mesh_dim_names))
            said = repr(tuple(dealt.example.shape)), mesh + repr(spec.placements)
            known[id(dealt)] = said if spec.mesh.size() == ranks else None
        words = known[id(dealt)]
        if words is not None:
            names.append(name)
            shapes.append(words[0])
            ways.append(words[1])
    return {
        "names of DTensors": digest(names),
        "shapes of DTensors": digest(shapes),
        "meshes and placements": digest(ways),
        "what rename= makes of them": digest(repr((sources.get(name), name in absent)) for name in names),
    }


def _spec(tensor: Any) -> Any:
    return tensor._spec
