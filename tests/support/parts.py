"""Shared by the tests of parts of tensors."""

from __future__ import annotations

import math
import mmap
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

ODD = 7  # what places hold before


@contextmanager
def rank_of(mesh: tuple[int, ...], rank: int) -> Iterator[Any]:
    """This process as one of the ranks of a mesh whose others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(mesh))
    try:
        yield init_device_mesh("cpu", mesh)
    finally:
        dist.destroy_process_group()


def empty_like(tensor: DTensor) -> DTensor:
    """A DTensor of the same kind that holds something else."""
    local = torch.full_like(tensor.to_local(), ODD)
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def untouched_like(tensor: DTensor) -> DTensor:
    """A DTensor of the same kind, in memory that nobody has touched: it is filled by read calls."""
    shard = tensor.to_local()
    local = torch.frombuffer(mmap.mmap(-1, shard.nbytes), dtype=shard.dtype).view(shard.shape)
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def random_placements(chance: random.Random, dimensions: int, mesh: tuple[int, ...]) -> list[Any]:
    found: list[Any] = []
    for number in range(len(mesh)):
        kind = chance.choice(["shard", "shard", "replicate", "strided"])
        if kind == "replicate" or not dimensions:
            found.append(Replicate())
        elif kind == "strided" and number == 0 and len(mesh) > 1:
            found.append(_StridedShard(chance.randrange(dimensions), split_factor=chance.choice([2, 3])))
        else:
            found.append(Shard(chance.randrange(dimensions)))
    return found


def cut(tensor: torch.Tensor, box: Any) -> torch.Tensor:
    """Cut a box that ``shard=`` answered out of a tensor: None, or a slice or a list of ranges for each dimension."""
    for dimension, item in enumerate(box or ()):
        pieces = [item] if isinstance(item, slice) else [slice(*ends) for ends in item]
        tensor = torch.cat([tensor[(slice(None),) * dimension + (piece,)] for piece in pieces], dimension)
    return tensor
