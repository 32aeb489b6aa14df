"""Shards in the memory of the simulated accelerator, of which several ranks have the same: load_into in real processes.

Functions whose first argument is a ``Rank`` run in every process.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SEED, write_tensors
from support.ranks.simulated import BACKENDS, KINDS, Rank, Ranks
from support.simulated import DEVICE, KIND, TUNED, native, raw, reference_of
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard

import weightload
from weightload import _C, errors, settings
from weightload._parts.shards import part_of_rank

pytestmark = pytest.mark.simulated


@pytest.fixture(scope="module", params=KINDS)
def four(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four ranks whose default group, and so the groups of their meshes, has a backend for the CPU or none."""
    native()  # built once, not by every process
    with Ranks(4, tmp_path_factory.mktemp("four"), SEED, BACKENDS[request.param]) as started:
        yield started


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = [[64, 300], [7, 11], [513, 96], [3], [40, 1024], [1000, 33]]
    file = tmp_path_factory.mktemp("replicas") / "m.safetensors"
    return write_tensors(file, [(f"t{number}", "F32", shape) for number, shape in enumerate(shapes)], seed=SEED)


PLACEMENTS: list[Any] = [(Replicate(), Shard(0)), (Replicate(), Shard(1)), (Replicate(), Replicate())]


def deal(mesh: DeviceMesh, whole: torch.Tensor, placements: Any) -> tuple[DTensor, torch.Tensor]:
    """A DTensor of zeros on the device, and what its memory should have."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    part = part_of_rank(tuple(whole.shape), tuple(mesh.shape), tuple(coordinate), placements)
    expected = whole[tuple(slice(*ranges[0]) if ranges else slice(0) for ranges in part)]
    local = torch.zeros(expected.shape, device=DEVICE)
    shape, stride = whole.shape, whole.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride), expected


def loads(rank: Rank, path: Path, strategy: str, failing: int | None) -> Any:
    mesh = DeviceMesh(KIND, [[0, 1], [2, 3]])
    whole = reference_of(path)
    for number, longest_us in enumerate((0, 500, 2500)):
        rank.seed(SEED + number, longest_us)
        target, expected = {}, {}
        for at, (name, tensor) in enumerate(whole.items()):
            # Most of it is replicated, and the rest read by each rank.
            placements = PLACEMENTS[(at + number) % 3] if tensor.dim() > 1 else (Shard(0), Shard(0))
            target[name], expected[name] = deal(mesh, tensor, placements)
        if failing == rank.number:
            _C.arm_fault("error", first=1, count=1 << 30, error_number=errno.EIO)
        if failing is not None:
            with settings.override(**TUNED), pytest.raises(errors.ReadError) as caught:
                weightload.load_into(target, path, strategy=strategy)
            _C.disarm_fault()
            assert (caught.value.rank, caught.value.errno) == (failing, errno.EIO)
            continue
        with settings.override(**TUNED):
            report = weightload.load_into(target, path, strategy=strategy)
        assert f"{DEVICE}, replicas" in report.stats
        for name, tensor in target.items():
            assert torch.equal(raw(tensor.to_local()), raw(expected[name].contiguous())), name
        read = torch.tensor(float(sum(file.bytes for stats in report.stats.values() for file in stats.files)))
        total = read.to(DEVICE)
        dist.all_reduce(total)
        wanted = sum(tensor.nbytes for tensor in whole.values())
        # Rows and replicas once; of halves of short rows also what lies between.
        assert wanted * 0.99 <= float(total.cpu()) <= 2 * wanted, (float(total.cpu()), wanted)
        del target


@pytest.mark.parametrize("strategy", ["auto", "broadcast"])
def test_replicas_share_what_they_read(four: Ranks, path: Path, strategy: str) -> None:
    four.call(loads, path, strategy, None)


@pytest.mark.parametrize("who", [0, 3])
def test_a_rank_that_cannot_read_fails_all(four: Ranks, path: Path, who: int) -> None:
    four.call(loads, path, "auto", who)
