"""``rename=`` on an accelerator: pieces are copied there into the tensor that they make, on the current stream."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SEED
from support.ranks.simulated import Rank, Ranks
from support.rename import Cut, numbers
from support.simulated import DEVICE, KIND, OTHER, SMALL, TUNED, current_stream, raw
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import weightload
from weightload import settings

pytestmark = pytest.mark.simulated


def cut_of(chance: random.Random, count: int = 10) -> Cut:
    whole = {}
    for number in range(count):
        shape = [chance.choice([1, 3, 40, 300]) for _ in range(chance.randrange(1, 4))]
        while torch.Size(shape).numel() > 200_000:
            shape.pop()
        whole[f"t{number}"] = numbers(shape, chance.choice([torch.float32, torch.bfloat16, torch.uint8]))
    return Cut(chance, whole)


def assert_same(ours: dict[str, torch.Tensor], cut: Cut) -> None:
    assert ours.keys() == cut.whole.keys()
    for name, tensor in cut.whole.items():
        assert (ours[name].shape, ours[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(raw(ours[name]), raw(tensor)), name


def test_pieces_become_one_tensor(simulated: Any, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        cut = cut_of(chance)
        with settings.override(**SMALL):
            weights = weightload.safetensors_weights_iterator(cut.save(folder, 2), device=DEVICE, rename=cut.answers)
            got = dict(weights)
        assert_same(got, cut)
        for tensor in got.values():
            assert str(tensor.device) == DEVICE
            assert tensor.is_contiguous()
        del got, tensor, weights


def test_pieces_fill_what_exists(simulated: Any, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        cut = cut_of(chance)
        target = {}
        for name, tensor in cut.whole.items():
            target[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=chance.choice([DEVICE, OTHER, "cpu"]))
        with settings.override(**SMALL):
            report = weightload.load_into(target, cut.save(folder, 2), rename=cut.answers)
        assert report.bytes == sum(tensor.nbytes for tensor in cut.whole.values())
        assert_same(target, cut)
        target.clear()


class Switching:
    """A load, each of whose pieces comes on another stream."""

    def __init__(self, weights: Any, streams: list[torch.Stream], chance: random.Random) -> None:
        self.weights, self.streams, self.chance = weights, streams, chance

    def __next__(self) -> Any:
        torch.accelerator.set_stream(self.chance.choice(self.streams))
        return next(self.weights)


def test_the_stream_that_is_current_may_change_between_pieces(simulated: Any, tmp_path: Path) -> None:
    """A stream waits for what others have copied before. Memory is not given away while they may write to it."""
    chance = random.Random(SEED)
    streams = [torch.Stream(DEVICE) for _ in range(3)]
    cut = cut_of(chance, 20)
    with settings.override(**SMALL), current_stream(streams[0]):
        weights: Any = weightload.safetensors_weights_iterator(cut.save(tmp_path), device=DEVICE, rename=cut.answers)
        weights._weights = Switching(weights._weights, streams, chance)
        copies: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            copies[name] = torch.empty_like(tensor)
            copies[name].copy_(tensor)  # on the stream that is current now
            del tensor
        del weights
    torch.accelerator.synchronize(torch.device(DEVICE))
    assert_same(copies, cut)
    copies.clear()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=str)
def test_shards_of_pieces(placement: Any, simulated: Any, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    cut = Cut(chance, {f"t{n}": numbers((chance.choice([3, 40, 300]), 64), torch.float32) for n in range(6)})
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = init_device_mesh(KIND, (2,))
        target, expected = {}, {}
        for name, whole in cut.whole.items():
            expected[name] = whole.chunk(2, placement.dim)[1].contiguous()
            local = torch.zeros(expected[name].shape, device=DEVICE)
            target[name] = DTensor.from_local(
                local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
            )
        with settings.override(**SMALL):
            report = weightload.load_into(target, cut.save(tmp_path), rename=cut.answers)
        assert report.bytes == sum(tensor.nbytes for tensor in expected.values())
        for name, tensor in target.items():
            assert torch.equal(raw(tensor.to_local()), raw(expected[name])), name
        # These tensors must be gone before the simulation looks for what is in use.
        del target, local, tensor
    finally:
        dist.destroy_process_group()


def shared(rank: Rank, strategy: str, folder: Path, seed: int) -> None:
    """A load that ranks share."""
    cut = cut_of(random.Random(seed), 6)
    if rank.number == 0:
        cut.save(folder, 2)
    with rank.group() as group, settings.override(**TUNED):
        dist.barrier(group)
        files = [folder / "0.safetensors", folder / "1.safetensors"]
        weights = weightload.safetensors_weights_iterator(
            files, device=DEVICE, group=group, strategy=strategy, rename=cut.answers
        )
        assert_same(dict(weights), cut)
        target = {name: torch.zeros_like(tensor, device=DEVICE) for name, tensor in cut.whole.items()}
        weightload.load_into(target, files, group=group, strategy=strategy, rename=cut.answers)
        assert_same(target, cut)


@pytest.mark.parametrize("strategy", ["broadcast", "striped"])
def test_pieces_of_loads_that_ranks_share(strategy: str, tmp_path: Path) -> None:
    with Ranks(2, tmp_path, SEED) as ranks:
        ranks.call(shared, strategy, tmp_path, SEED)
