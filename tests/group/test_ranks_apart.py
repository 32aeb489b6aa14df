"""Ranks of a group that want different tensors, or parts of them: what all want is shared, the rest each reads."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from conftest import SEED, TESTS
from support.ranks.groups import assert_done, run_ranks

LOADS = """
import random
import safetensors, safetensors.torch
from weightload import _C, errors, settings
from support.parts import cut

paths = sys.argv[4:]
whole = {name: tensor for path in paths for name, tensor in safetensors.torch.load_file(path).items()}
order = [name for path in paths for name in safetensors.safe_open(path, "pt").offset_keys()]
SMALL = {"block_bytes": 4096, "task_bytes": 4096, "window_bytes": 8192, "threads": 2}
group = dist.group.WORLD

def load(names=None, shard=None, **options):
    options = {"to_cpu": False, "device": "cpu", "group": group, "show_progress": False} | options
    return weightload.safetensors_weights_iterator(paths, names=names, shard=shard, **options)

def bytes_read(weights):
    return sum(file.bytes for file in weights.stats().files)

def check(weights, names, boxes=()):
    boxes = dict(boxes)
    expected = [name for name in order if name in names and boxes.get(name) is not False]
    size = 0
    for name, (got, tensor) in zip(expected, weights, strict=True):
        right = cut(whole[name], boxes.get(name))
        assert got == name and torch.equal(tensor, right) and tensor.is_contiguous(), (name, got)
        size += right.nbytes
    assert len(weights) == len(expected) and weights.total_bytes == size
    stats = weights.stats()
    assert stats.ended and stats.bytes == size and stats.tensors == len(expected)
    return size

# Each rank its experts, and the rest of the model on all: of the rest each byte is read once.
experts = [name for name in order if "expert" in name]
rest = [name for name in order if "expert" not in name]
own = experts[rank::size]
for strategy in ("striped", "broadcast"):
    for tuned in ({}, SMALL):
        with settings.override(**tuned):
            weights = load(names=[*rest, *own], strategy=strategy, backend="pread")
            check(weights, {*rest, *own})
            read = torch.tensor(float(bytes_read(weights)))
            dist.all_reduce(read)
            assert float(read) == sum(tensor.nbytes for tensor in whole.values()), float(read)

# Any names and boxes, on any rank; sometimes nothing.
chance, own_chance = random.Random(SEED), random.Random(SEED * 10 + rank)

def box_of(tensor):
    kind = own_chance.randrange(4)
    if kind < 2:
        return (None, False)[kind]
    begin = own_chance.randrange(tensor.shape[0] + 1)
    return (slice(begin, begin + 3),) if kind == 2 else (slice(None), [(0, 1), (2, 4)])

for number in range(20):
    names = {name for name in order if chance.random() < 0.7 or own_chance.random() < 0.5}
    if own_chance.random() < 0.1:
        names = set()
    boxes = {name: box_of(whole[name]) for name in order if own_chance.random() < chance.choice([0.1, 0.9])}
    if not boxes and number % 3:
        boxes = None
    shard = None if boxes is None else lambda name, shape, dtype: boxes.get(name)
    with settings.override(**chance.choice([{}, SMALL])):
        check(load(names, shard, strategy=chance.choice(["striped", "broadcast", "auto"])), names, boxes or {})

# Left early: the others hear it where they share, or load all the same.
def drain(weights):
    try:
        return len(list(weights))
    except errors.RankLeftError as error:
        assert error.rank == 1
        return error

with settings.override(**SMALL):
    weights = load(names=[*rest, *own], strategy="striped")
    if rank == 1:
        next(weights)
        weights.close()
        assert list(weights) == []
    else:
        assert isinstance(drain(weights), errors.RankLeftError)

# One rank's shard= gives a wrong answer, and a read of its own fails.
def refuse(name, shape, dtype):
    return (slice(None, None, 2),) if rank == 1 else None

try:
    load(shard=refuse, strategy="striped")
except errors.GroupValueError as error:
    assert error.rank == 1 and "step 2" in str(error)
else:
    raise AssertionError("no error")

def fail_reading(strategy):
    with settings.override(**SMALL):
        weights = load(names=[*rest, *own], strategy=strategy, backend="pread")
        if rank == 1:
            next(weights)
            _C.arm_fault("error", first=0, count=1 << 30, error_number=5)
        try:
            list(weights)
        except errors.ReadError as error:
            return error
        finally:
            _C.disarm_fault()
        raise AssertionError("no error")

error = fail_reading("striped")
assert error.rank in (None, 1) and error.errno == 5, repr(error)
# Here it is none that is shared: under broadcast the first rank reads that.
error = fail_reading("broadcast")
assert error.errno == 5 and error.rank == (None if rank == 1 else 1) and "expert" in error.tensor, repr(error)
check(load(strategy="striped"), set(order))
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_ranks_that_want_different_tensors(tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    paths = []
    for number in range(2):
        tensors = {f"{number}.layer.{n}": torch.randn(5 + n, 30) for n in range(20)}
        tensors |= {f"{number}.expert.{n}": torch.randn(40, 17) for n in range(12)}
        paths.append(tmp_path / f"{number}.safetensors")
        safetensors.torch.save_file(tensors, paths[-1])
    here = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
    assert_done(run_ranks(here + LOADS.replace("SEED", str(SEED)), 3, tmp_path, *paths))
