"""Ranks that have the same shards (HSDP) read them once and share: load_into by real ranks over gloo."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from conftest import SEED
from support.ranks.groups import assert_done, run_ranks

LOADS = """
import random, time
import safetensors.torch
from torch.distributed.tensor import Replicate, Shard, _StridedShard, distribute_tensor, init_device_mesh
from weightload import _C, errors, settings
from weightload._into import filling

path = sys.argv[4]
whole = safetensors.torch.load_file(path)
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
SMALL = {"block_bytes": 4096, "task_bytes": 4096, "window_bytes": 8192, "threads": 2}

def deal(tensor, placements):
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

def empty_like(shards):
    return {name: deal(torch.zeros(shard.shape), shard.placements) for name, shard in shards.items()}

def load(shards, **options):
    into = empty_like(shards)
    report = weightload.load_into(into, path, **options)
    for name, shard in shards.items():
        assert torch.equal(into[name].to_local(), shard.to_local()), (name, shard.placements)
    return report

def bytes_read(report):
    return sum(file.bytes for stats in report.stats.values() for file in stats.files)

def sum_over_ranks(number):
    total = torch.tensor(float(number))
    dist.all_reduce(total)
    return float(total)

# Rows: over all ranks each byte is read once, whatever the cutting.
rows = {name: deal(tensor, (Replicate(), Shard(0))) for name, tensor in whole.items()}
size = sum(tensor.nbytes for tensor in whole.values())
for strategy in ("striped", "broadcast"):
    for tuned in ({}, SMALL):
        with settings.override(**tuned):
            report = load(rows, strategy=strategy)
            assert sum_over_ranks(bytes_read(report)) == size, (bytes_read(report), size)
            assert list(report.stats) == ["cpu, replicas"] and report.bytes == sum(
                shard.to_local().nbytes for shard in rows.values()
            )
# On the CPUs of a node everybody reads; and where they are told to.
for strategy in ("auto", "independent"):
    report = load(rows, strategy=strategy)
    assert sum_over_ranks(bytes_read(report)) == 2 * size and list(report.stats) == ["cpu"]

# Tensors of any placements.
chance = random.Random(SEED)
ways = [
    (Replicate(), Shard(1)), (Replicate(), Replicate()), (Shard(0), Replicate()), (Shard(0), Shard(1)),
    (_StridedShard(0, split_factor=2), Shard(0)),
]
for _ in range(12):
    shards = {
        name: deal(tensor, (Replicate(), Shard(0)) if chance.random() < 0.5 else chance.choice(ways))
        for name, tensor in whole.items()
    }
    with settings.override(**chance.choice([{}, SMALL])):
        load(shards, strategy=chance.choice(["striped", "broadcast"]))

# A rank that fails, in what is shared and in what is not, is known by its number in the mesh.
mixed = rows | {"t0": deal(whole["t0"], (Shard(0), Shard(0)))}
for shards, first in ((rows, 0), (mixed, 0), (mixed, 1), (mixed, 2)):
    for who in (0, 3):
        if rank == who:
            _C.arm_fault("error", first=first, count=1 << 30, error_number=5)
        try:
            with settings.override(**SMALL):
                load(shards, strategy="striped")
        except errors.ReadError as error:
            assert error.rank == who and error.errno == 5, repr(error)
            assert str(error).count(f"rank {who}") == 1 and str(error).count("rank") == 1, str(error)
        else:
            raise AssertionError("no error")
        _C.disarm_fault()
# The cause is the error while a tensor is put into place, not that the rank has left.
put = filling._put
def failing(*arguments):
    if rank == 3:
        raise errors.OutOfMemoryError("none left")
    put(*arguments)
filling._put = failing
try:
    with settings.override(**SMALL):
        load(rows, strategy="striped")
except errors.OutOfMemoryError as error:
    assert "none left" in str(error) and error.rank in (3, None if rank == 3 else 3), repr(error)
else:
    raise AssertionError("no error")
filling._put = put
load(rows, strategy="striped")

# An error on one rank alone, after the ranks have agreed and before they begin to share, is raised on all.
where = filling.reads_apart
def failing_there(*arguments):
    if rank == 1:
        raise errors.OutOfMemoryError("none here")
    return where(*arguments)
filling.reads_apart = failing_there
begin = time.monotonic()
try:
    load(rows, strategy="striped")
except errors.OutOfMemoryError as error:
    assert "none here" in str(error) and error.rank in (1, None if rank == 1 else 1), repr(error)
else:
    raise AssertionError("no error")
assert time.monotonic() - begin < 60, "it was waited for"
filling.reads_apart = where
load(rows, strategy="striped")
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_replicas_read_each_byte_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = {f"t{number}": torch.randn(13 + number, 40) for number in range(20)}
    safetensors.torch.save_file(whole, tmp_path / "m.safetensors")
    assert_done(run_ranks(LOADS.replace("SEED", str(SEED)), 4, tmp_path, tmp_path / "m.safetensors"))
