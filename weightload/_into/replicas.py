"""Ranks that have the same shards: they read them once, and share."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from weightload._base.paths import Path
from weightload._base.plain_torch import plainly
from weightload._group.ranks import group_of_dimension, ranks_of_this_node, resolve_group, world_is_one_node
from weightload._load.start import fail_together
from weightload._parts.shards import Dealt

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LEAST_SAVED = 0.1
"""A part of the bytes that a rank would read. Where sharing saves less, collectives are not worth their time."""


@dataclasses.dataclass
class Replicas:
    """Ranks of which each has the same part of some tensors."""

    group: ProcessGroup
    strategy: str
    device: torch.device
    names: set[str]
    """The tensors, by their names in the target. Those that are on another device are not shared."""

    def fail(self, error: BaseException, paths: Sequence[Path]) -> None:
        """Raise this rank's error on all of them, in place of the shared load that the others are about to begin."""
        with self.numbered_globally():
            fail_together(error, self.group, self.strategy, paths, self.device)

    @contextlib.contextmanager
    def numbered_globally(self) -> Iterator[None]:
        """Have an error of the shared load name its rank as the default group numbers it, as a mesh does."""
        try:
            yield
        except BaseException as error:
            rank = getattr(error, "rank", None)
            if rank is not None:
                error.rank = torch.distributed.get_process_group_ranks(self.group)[rank]  # type: ignore[attr-defined]
            raise


@plainly
def find_replicas(dtensors: Mapping[str, Dealt], strategy: str, load: str) -> Replicas | None:
    """The ranks that share the reading of DTensors: those of the dimension of a mesh along which most is replicated.

    The same on all ranks of a mesh, and a collective call for the ranks of that dimension.

    Args:
        strategy: as of ``load_into``. ``"auto"``: shared between accelerators, and between nodes; not on the CPUs of a
            node, which share the page cache.
        load: what errors call it.
    """
    if strategy == "independent":
        return None
    kinds = {dealt.example.device.type for dealt in {id(dealt): dealt for dealt in dtensors.values()}.values()}
    if strategy == "auto" and kinds == {"cpu"} and torch.distributed.is_initialized() and world_is_one_node():
        return None
    names: dict[tuple[int, int], list[str]] = {}
    meshes: dict[int, Any] = {}
    saved: dict[tuple[int, int], float] = {}
    ways: dict[int, tuple[float, list[tuple[tuple[int, int], int]]]] = {}  # a mesh answers slowly
    total = 0.0
    for name, dealt in dtensors.items():
        if id(dealt) not in ways:
            spec: Any = dealt.example._spec  # type: ignore[attr-defined]
            meshes[id(spec.mesh)] = spec.mesh
            ways[id(dealt)] = _even_share(dealt.example, spec)
        bytes_here, copies = ways[id(dealt)]
        total += bytes_here
        for key, size in copies:
            names.setdefault(key, []).append(name)
            saved[key] = saved.get(key, 0.0) + bytes_here * (1 - 1 / size)
    most = max(saved, key=saved.__getitem__, default=None)
    if most is None or saved[most] < LEAST_SAVED * total:
        return None
    mesh = meshes[most[0]]
    if mesh.get_coordinate() is None:
        return None
    group = group_of_dimension(mesh, most[1])
    shard: Any = dtensors[names[most][0]].example
    device: torch.device = shard._local_tensor.device
    if group is None or device.type not in {backend.type for backend in group._device_types}:
        return None
    shared, chosen = resolve_group(group, strategy, device.type, load)
    if shared is None or chosen == "independent":
        return None
    return Replicas(shared, chosen, device, set(names[most]))


def _even_share(tensor: torch.Tensor, spec: Any) -> tuple[float, list[tuple[tuple[int, int], int]]]:
    """A rank's bytes of a DTensor, and along which dimensions of its mesh how many ranks have the same.

    Of an even share, so that ranks whose last chunks are short come to the same answer.
    """
    share, copies = float(tensor.numel() * tensor.element_size()), []
    for dimension, (size, placement) in enumerate(zip(spec.mesh.shape, spec.placements, strict=True)):
        if not placement.is_replicate():
            share /= size
        elif size > 1:
            copies.append(((id(spec.mesh), dimension), size))
    return share, copies


@plainly
def reads_apart(dtensors: Iterable[Dealt], total_bytes: int) -> bool:
    """Whether most of what this rank reads for DTensors no other rank of its node reads, where there are others.

    Args:
        dtensors: those that it fills.
        total_bytes: all that it fills.
    """
    on_node = ranks_of_this_node()
    if on_node <= 1 or not torch.distributed.is_initialized():
        return False
    node = torch.distributed.get_rank() // on_node
    own = 0
    known: dict[int, int] = {}
    for dealt in dtensors:
        if id(dealt) not in known:
            spec: Any = dealt.example._spec  # type: ignore[attr-defined]
            same = _ranks_of_replicas(spec.mesh, spec.placements)
            is_own = sum(rank // on_node == node for rank in same) == 1
            known[id(dealt)] = is_own * math.prod(dealt.shape) * dealt.example.element_size()
        own += known[id(dealt)]
    return 2 * own > total_bytes


def _ranks_of_replicas(mesh: Any, placements: Sequence[Any]) -> list[int]:
    """The ranks that have what this one has of a tensor, itself among them; none if it has nothing."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return []
    at = tuple(
        slice(None) if placement.is_replicate() else number
        for number, placement in zip(coordinate, placements, strict=True)
    )
    ranks: list[int] = mesh.mesh[at].flatten().tolist()
    return ranks
