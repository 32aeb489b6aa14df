"""Which part of a tensor a rank's shard of it is: indices by dimension, as ``distribute_tensor`` deals them out."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from weightload._base.dtypes import torch_shape

Ranges = tuple[tuple[int, int], ...]
"""Indices of one dimension: begin and end of each run of them, in order."""
Part = tuple[Ranges, ...]
"""The wanted range of each dimension of a tensor."""
Parts = Mapping[str, Part]
"""The parts of tensors, by name; of other tensors all is wanted."""
NOTHING: Part = ((),)
"""The empty part of a tensor without dimensions."""
NO_PARTS: Parts = MappingProxyType({})


FSDP = "torch.distributed.fsdp._fully_shard"
"""The package of ``fully_shard``."""


class NotAShardError(ValueError):
    """Why a DTensor's memory is no part of a tensor; to be said after its name."""


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, without importing what makes them."""
    return _are_dtensors(type(tensor))


@functools.lru_cache(maxsize=64)
def _are_dtensors(kind: type) -> bool:
    return any(base.__name__ == "DTensor" and base.__module__.startswith("torch.distributed") for base in kind.__mro__)


def chunk(ranges: Sequence[tuple[int, int]], chunks: int, number: int) -> Ranges:
    """The indices in one of the chunks that ``torch.chunk`` makes: all of one size, but for the last ones.

    Args:
        ranges: the indices there are.
        chunks: how many chunks.
        number: which of them; those behind the end are empty.
    """
    size = sum(end - begin for begin, end in ranges)
    each = -(-size // chunks)
    return _between(ranges, min(size, number * each), min(size, (number + 1) * each))


def _between(ranges: Sequence[tuple[int, int]], first: int, last: int) -> Ranges:
    """Return the indices at the places [first, last) of a list of them."""
    found = []
    at = 0
    for begin, end in ranges:
        low, high = max(first - at, 0), min(last - at, end - begin)
        if low < high:
            found.append((begin + low, begin + high))
        at += end - begin
    return tuple(found)


def part_of_rank(
    shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Any, ...]
) -> Part:
    """The indices of a tensor that a rank's shard has.

    The dimensions of the mesh take their turns from left to right, each dealing out what the ones before have left.
    ``_StridedShard``, of FSDP over tensor parallelism, deals out each of ``split_factor`` chunks by itself.

    Args:
        shape: of the whole tensor.
        mesh: the sizes of the mesh's dimensions.
        coordinate: the rank's place in the mesh.
        placements: one for each dimension of the mesh, of ``torch.distributed.tensor``.

    Raises:
        NotAShardError: a placement is neither a shard nor a replica.
    """
    return _part_of_rank(shape, mesh, coordinate, placements, tuple(map(type, placements)))


@functools.lru_cache(maxsize=1024)  # the layers of a model are alike
def _part_of_rank(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Any, ...],
    kinds: tuple[type, ...],
) -> Part:
    """``kinds``: of the placements. To torch a subclass of Shard that deals out otherwise is equal to a Shard."""
    part: list[Ranges] = [((0, size),) for size in shape]
    for size, number, placement, of in zip(mesh, coordinate, placements, kinds, strict=True):
        if placement.is_replicate():
            continue
        # torch has made the strided one a Shard, and not one, from release to release.
        kind = of.__name__
        if kind not in ("Shard", "_StridedShard"):
            raise NotAShardError(f"its placement {placement} is neither Shard nor Replicate")
        dimension = placement.dim % max(len(shape), 1)
        if dimension >= len(shape):
            raise NotAShardError(f"its placement {placement} is of a dimension that it lacks")
        own: Ranges = ()
        factor = placement.split_factor if kind == "_StridedShard" else 1
        for piece in range(factor):
            own += chunk(chunk(part[dimension], factor, piece), size, number)
        part[dimension] = own
    return tuple(part)


def shape_of(part: Part) -> tuple[int, ...]:
    """The shape of what a part has."""
    return tuple(sum(end - begin for begin, end in ranges) for ranges in part)


def bytes_of_part(size: int, part: Part, dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a part of a file's tensor that has ``size``."""
    whole = math.prod(torch_shape(dtype, shape))
    return size * math.prod(sum(end - begin for begin, end in ranges) for ranges in part) // whole if whole else 0


class Dealt(NamedTuple):
    """The local shard of DTensors of one shape and dtype that a mesh deals out alike."""

    part: Part
    is_all: bool
    shape: tuple[int, ...]
    """Shape of their memory on this rank."""
    is_elsewhere: bool
    """Whether this rank is not in their mesh."""
    example: torch.Tensor
    """One of them."""


Known = dict[object, Dealt]
"""Shards by layout, asked for once while tensors with it are alive: a mesh answers slowly."""


def _dealt(tensor: torch.Tensor, spec: Any) -> Dealt:
    kind: Any = type(spec)
    order = getattr(spec, "shard_order", None)
    if order is not None and order != _default_order(kind, spec.placements):
        raise NotAShardError("its dimensions are dealt out in an order of their own (shard_order)")
    coordinate = spec.mesh.get_coordinate()
    if coordinate is None:
        return Dealt(((),) * tensor.dim() or NOTHING, False, (), True, tensor)
    part = part_of_rank(tuple(tensor.shape), tuple(spec.mesh.shape), tuple(coordinate), tuple(spec.placements))
    is_all = all(ranges == ((0, size),) for ranges, size in zip(part, tensor.shape, strict=True))
    return Dealt(part, is_all, shape_of(part), False, tensor)


def shard_of(tensor: torch.Tensor, known: Known) -> tuple[torch.Tensor, Dealt]:
    """A DTensor's memory on this rank, and which part of it that is.

    To be called without autograd: with it the memory is a view, and each a node of the graph.

    Raises:
        NotAShardError: its memory holds something else.
    """
    given: Any = tensor
    spec = given._spec
    local: torch.Tensor = given.to_local()
    # With the placements' types: see _part_of_rank.
    alike = spec.placements, *map(type, spec.placements), getattr(spec, "shard_order", None)
    key = id(spec.mesh), tensor.shape, tensor.dtype, alike
    dealt = known.get(key)
    if dealt is None:
        dealt = known[key] = _dealt(tensor, spec)
    if dealt.is_elsewhere:
        if local.numel():
            raise NotAShardError(f"this rank is not in its mesh, but has {tuple(local.shape)} of it")
    elif dealt.shape != local.shape and (local.numel() or math.prod(dealt.shape)):
        raise NotAShardError(f"its placements give this rank {dealt.shape}, but it has {tuple(local.shape)}")
    return local, dealt


@functools.lru_cache(maxsize=1024)
def _default_order(kind: Any, placements: tuple[Any, ...]) -> object:
    """How torch says that the dimensions of a mesh take their turns from left to right."""
    compute = getattr(kind, "compute_default_shard_order", None)
    return None if compute is None else compute(placements)


def go_back_to_shards(target: object) -> None:
    """Have the modules of a target that FSDP has gathered for a forward go back to their shards.

    It does so itself before ``state_dict`` and ``load_state_dict``, by a hook.
    """
    # Looking for its hooks takes a microsecond a module, which only its users are to spend.
    if FSDP not in sys.modules or not isinstance(target, torch.nn.Module):
        return
    for module in target.modules():
        for hook in (module._load_state_dict_pre_hooks or {}).values():
            if is_resharding(hook):
                hook({}, "", {}, True, [], [], [])


def is_resharding(hook: object) -> bool:
    """Whether a hook before loading is FSDP's own, which does no more than to go back to the shards."""
    return _is_of_fsdp(getattr(hook, "hook", hook)) and _name(getattr(hook, "hook", hook)).endswith(".to_sharded_hook")


def may_forgive(hook: object) -> bool:
    """Whether a hook after loading may change which names are missing: FSDP's own looks after its memory only."""
    return not (_is_of_fsdp(hook) and "FSDPParam.__init__." in _name(hook))


def _is_of_fsdp(function: object) -> bool:
    return str(getattr(function, "__module__", "")).startswith(f"{FSDP}.")


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", ""))
