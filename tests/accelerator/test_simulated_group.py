"""Loads that ranks share, with collectives that are late (simulated_accelerator/process_group.cpp), in real processes.

Functions whose first argument is a ``Rank`` run in every process.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torch.distributed as dist
from conftest import SEED, write_tensors
from support.ranks.simulated import KINDS, Rank, Ranks
from support.simulated import (
    DEVICE,
    TUNED,
    assert_same,
    assert_untouched,
    current_stream,
    filled,
    raw,
    reference_of,
    take_freed_memory,
)

import weightload
from weightload import _C, errors, settings

pytestmark = pytest.mark.simulated

STRATEGIES = ["broadcast", "striped"]


# Shared loads.

Tensors = dict[str, torch.Tensor]


def load(group: Any, strategy: str, paths: list[Path]) -> Any:
    return weightload.safetensors_weights_iterator(paths, device=DEVICE, group=group, strategy=strategy)


def assert_bytes(got: Tensors, paths: list[Path]) -> None:
    reference = reference_of(*paths)
    assert list(got) == list(order_of(paths))
    for name, tensor in got.items():
        assert torch.equal(raw(tensor), raw(reference[name])), name


def order_of(paths: list[Path]) -> list[str]:
    return [name for path in paths for name in safetensors.safe_open(path, "pt").offset_keys()]


def keep_all(group: Any, strategy: str, paths: list[Path]) -> None:
    got = dict(load(group, strategy, paths))
    assert_same(got, *paths)
    assert list(got) == order_of(paths)


def use_and_drop(group: Any, strategy: str, paths: list[Path]) -> None:
    """Work on the current stream is queued at once; the tensor is gone before it runs."""
    assert_bytes({name: tensor.clone() for name, tensor in load(group, strategy, paths)}, paths)


def own_stream(group: Any, strategy: str, paths: list[Path]) -> None:
    with current_stream(torch.Stream(device=DEVICE)):
        use_and_drop(group, strategy, paths)


def changing_streams(group: Any, strategy: str, paths: list[Path]) -> None:
    streams = [torch.Stream(device=DEVICE) for _ in range(3)]
    weights, copies = load(group, strategy, paths), {}
    for number in range(len(weights)):
        with current_stream(streams[number % 3]):
            name, tensor = next(weights)
            copies[name] = tensor.clone()
        del tensor
    assert list(weights) == []
    torch.accelerator.synchronize()
    assert_bytes(copies, paths)


def collectives_of_its_own(group: Any, strategy: str, paths: list[Path]) -> None:
    """The consumer uses the same group between two tensors, as sharding code does."""
    copies = {}
    for number, (name, tensor) in enumerate(load(group, strategy, paths)):
        if number % 40 == 3:
            total = torch.full((5,), group.rank(), dtype=torch.int64).to(DEVICE)
            dist.all_reduce(total, group=group)
            assert total.tolist() == [sum(range(group.size()))] * 5
            if tensor.numel():
                dist.broadcast(tensor, group=group, group_src=0)
        copies[name] = tensor.clone()
    assert_bytes(copies, paths)


def zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """torch's own does not know every dtype."""
    return torch.zeros(tensor.nbytes, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)


def into_parameters(group: Any, strategy: str, paths: list[Path]) -> None:
    """Work that was queued before the load reads the old bytes. Work that is queued after it reads the new ones."""
    target = {name: zeros_like(tensor).to(DEVICE) for name, tensor in reference_of(*paths).items()}
    before = {name: tensor.clone() for name, tensor in target.items()}
    weightload.load_into(target, paths, group=group, strategy=strategy)
    after = {name: target[name].clone() for name in order_of(paths)}
    assert not any(bool(raw(tensor).any()) for tensor in before.values())
    assert_bytes(after, paths)


CONSUMERS = [keep_all, use_and_drop, own_stream, changing_streams, collectives_of_its_own, into_parameters]


def loads(rank: Rank, kind: str, members: list[int], strategy: str, consumer: str, paths: list[Path]) -> None:
    with rank.group(kind, members) as group:
        if group is None:
            return
        for number, longest_us in enumerate((0, 500, 2500)):
            rank.seed(SEED + number, longest_us)
            with settings.override(**TUNED):
                globals()[consumer](group, strategy, paths)


@pytest.mark.parametrize("consumer", [consumer.__name__ for consumer in CONSUMERS])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_gets_every_byte(ranks: Ranks, mixed: list[Path], kind: str, strategy: str, consumer: str) -> None:
    """Tensors of no bytes, smaller than a stripe and larger than a block; as many files as ranks."""
    ranks.call(loads, kind, [0, 1, 2], strategy, consumer, mixed)


def loads_of_own_choice(rank: Rank, kind: str, strategy: str, paths: list[Path]) -> None:
    """Every third tensor is one rank's, of every fifth each rank wants some rows; the rest is shared."""
    reference = reference_of(*paths)
    order = order_of(paths)
    mine = {name for number, name in enumerate(order) if number % 3 or number // 3 % rank.size == rank.number}
    rows = {name: slice(rank.number, rank.number + 2) for name in order[::5] if reference[name].dim()}

    def shard(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        return (rows[name],) if name in rows else None

    with rank.group(kind) as group:
        for number, longest_us in enumerate((0, 500, 2500)):
            rank.seed(SEED + number, longest_us)
            with settings.override(**TUNED):
                weights = weightload.safetensors_weights_iterator(
                    paths, device=DEVICE, group=group, strategy=strategy, names=mine, shard=shard
                )
                got = {name: tensor.clone() for name, tensor in weights}
            assert list(got) == [name for name in order if name in mine]
            for name, tensor in got.items():
                expected = reference[name][rows[name]] if name in rows else reference[name]
                assert torch.equal(raw(tensor), raw(expected.contiguous())), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_want_different_tensors(ranks: Ranks, mixed: list[Path], kind: str, strategy: str) -> None:
    ranks.call(loads_of_own_choice, kind, strategy, mixed)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto", "independent"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_in_one_file_for_two_ranks(ranks: Ranks, all_dtypes: Path, kind: str, strategy: str) -> None:
    """Fewer files than ranks, and ranks of the group that are not those of the world."""
    for consumer in ("keep_all", "use_and_drop", "into_parameters"):
        ranks.call(loads, kind, [1, 2], strategy, consumer, [all_dtypes])


def checked(rank: Rank, kind: str, strategy: str, paths: list[Path]) -> None:
    """Right digests, a wrong one, and a rank that leaves; every rank hears of it."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    wrong = digests | {paths[1].name: "0" * 64}
    with rank.group(kind) as group, settings.override(**TUNED):
        rank.seed(SEED)
        options: dict[str, Any] = {"device": DEVICE, "group": group, "strategy": strategy}
        got = dict(weightload.safetensors_weights_iterator(paths, verify=digests, **options))
        assert_bytes(got, paths)
        for left in (False, True):
            weights = weightload.safetensors_weights_iterator(paths, verify=digests if left else wrong, **options)
            if left and rank.number == 1:
                for _ in range(len(weights)):
                    next(weights)
                weights.close()
                continue
            with pytest.raises(errors.RankLeftError if left else errors.ChecksumError) as raised:
                dict(weights)
            assert raised.value.rank is not None
            assert raised.value.filename == (None if left else str(paths[1]))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_check_the_files(ranks: Ranks, mixed: list[Path], kind: str, strategy: str) -> None:
    ranks.call(checked, kind, strategy, mixed)


def extremes(rank: Rank, kind: str, strategy: str, paths: list[Path], chosen: dict[str, Any]) -> None:
    with rank.group(kind) as group, settings.override(**{**TUNED, **chosen}):
        for seed in range(2):
            rank.seed(SEED + seed)
            use_and_drop(group, strategy, paths)


@pytest.mark.parametrize(
    "chosen",
    [
        {"slot_bytes": 4096, "pinned_bytes": 4096, "device_block_bytes": 4096, "threads": 1},
        {"slot_bytes": 8192, "pinned_bytes": 64 << 10, "device_block_bytes": 50_001, "threads": 5},
        {"slot_bytes": 8 << 20, "pinned_bytes": 32 << 20, "device_block_bytes": 128 << 20},
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_cutting_gives_the_same_bytes(
    ranks: Ranks, mixed: list[Path], kind: str, strategy: str, chosen: dict[str, Any]
) -> None:
    ranks.call(extremes, kind, strategy, [mixed[0], mixed[2]], chosen)


def held(rank: Rank, strategy: str, paths: list[Path]) -> None:
    """Records travel between CPUs here: with every stream held, the host goes on all the same."""
    with rank.group("both") as group:
        dist.broadcast(filled(0), group=group, group_src=0)  # the communicator's stream exists from its first use
        # A slot holds pieces of one stripe: with larger ones the ring would run out, and the host wait for that.
        finer = {"slot_bytes": 64 << 10} if strategy == "striped" else {}
        gates = hold_everything(rank, own=True)
        with settings.override(device_block_bytes=1 << 20, **finer):
            got = dict(load(group, strategy, paths))
        for gate in gates:
            gate()
        assert_same(got, *paths)


def hold_everything(rank: Rank, own: bool) -> list[Any]:
    streams = [*([0] if own else []), *rank.native.side_streams(0), *rank.native.communicator_streams(0)]
    return [rank.native.hold_stream(0, stream) for stream in streams]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_host_never_waits_for_the_device(ranks: Ranks, shards: list[Path], strategy: str) -> None:
    ranks.call(held, strategy, shards)


def leave_together(rank: Rank, kind: str, strategy: str, paths: list[Path], taken: int) -> None:
    """Tensors that get the memory of untaken blocks must stay whole, though collectives still write to those blocks."""
    with rank.group(kind) as group, settings.override(**{**TUNED, "pinned_bytes": 64 << 20}):
        for seed in range(2):
            rank.seed(SEED + seed)
            dist.broadcast(filled(0), group=group, group_src=0)
            rank.native.synchronize(0)
            weights = load(group, strategy, paths)
            # Without a backend for the CPU, a held device would keep the ranks' records from travelling.
            gates = hold_everything(rank, own=False) if kind == "both" else []
            for _ in range(taken):
                next(weights)
            weights.close()
            del weights
            gc.collect()
            taken_over = take_freed_memory()
            for gate in gates:
                gate()
            rank.native.synchronize(0)
            assert_untouched(taken_over)
            del taken_over
            use_and_drop(group, strategy, paths)


@pytest.mark.parametrize("taken", [0, 1, 20])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_may_leave_early(ranks: Ranks, shards: list[Path], kind: str, strategy: str, taken: int) -> None:
    ranks.call(leave_together, kind, strategy, shards, taken)


def one_leaves(rank: Rank, kind: str, strategy: str, paths: list[Path], who: int) -> None:
    reference = reference_of(*paths)
    with rank.group(kind) as group, settings.override(**TUNED):
        for seed, taken in enumerate((0, 1, 30)):
            rank.seed(SEED + seed)
            weights = load(group, strategy, paths)
            copies = {}
            if rank.number == who:
                for _ in range(taken):
                    next(weights)
                weights.close()
            else:
                with pytest.raises(errors.RankLeftError) as caught:
                    for name, tensor in weights:
                        copies[name] = tensor.clone()
                assert caught.value.rank == who
                del caught
                tensor = None
            del weights
            for name, copy in copies.items():
                assert torch.equal(raw(copy), raw(reference[name])), name
            use_and_drop(group, strategy, paths)


@pytest.mark.parametrize(("kind", "who"), [("both", 0), ("both", 2), ("device", 2)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_may_leave_early_and_the_others_are_told(
    ranks: Ranks, shards: list[Path], kind: str, strategy: str, who: int
) -> None:
    ranks.call(one_leaves, kind, strategy, shards, who)


def one_cannot_read(rank: Rank, kind: str, strategy: str, paths: list[Path], who: int) -> None:
    with rank.group(kind) as group, settings.override(**TUNED):
        for seed, first in enumerate((1, 6, 20)):
            rank.seed(SEED + seed)
            if rank.number == who:
                _C.arm_fault("error", first=first, count=10**6, error_number=errno.EIO)
            copies = {}
            with pytest.raises(errors.ReadError) as caught:
                for name, tensor in load(group, strategy, paths):
                    copies[name] = tensor.clone()
            _C.disarm_fault()
            assert (caught.value.errno, caught.value.rank) == (errno.EIO, who)
            assert caught.value.tensor not in copies
            del caught
            tensor = None
            reference = reference_of(*paths)
            for name, copy in copies.items():
                assert torch.equal(raw(copy), raw(reference[name])), name
            use_and_drop(group, strategy, paths)


@pytest.mark.parametrize(("strategy", "who"), [("broadcast", 0), ("striped", 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_cannot_read_fails_all(ranks: Ranks, mixed: list[Path], kind: str, strategy: str, who: int) -> None:
    ranks.call(one_cannot_read, kind, strategy, mixed, who)


def one_has_a_wrong_argument(rank: Rank, kind: str, paths: list[Path]) -> None:
    with rank.group(kind) as group:
        duplicates: Any = "none" if rank.number == 1 else "error"
        with pytest.raises(errors.GroupValueError, match="rank 1 failed before it began: ValueError: dup"):
            weightload.safetensors_weights_iterator(paths, device=DEVICE, group=group, duplicates=duplicates)
        use_and_drop(group, "broadcast", paths)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_argument_of_one_rank_is_raised_on_all(ranks: Ranks, mixed: list[Path], kind: str) -> None:
    ranks.call(one_has_a_wrong_argument, kind, mixed, timeout_s=100)


def one_has_no_memory(rank: Rank, kind: str, strategy: str, paths: list[Path]) -> None:
    with rank.group(kind) as group, settings.override(**TUNED):
        for limit in (0, 300_000, 1_500_000):
            with contextlib.suppress(errors.WeightLoadError):
                use_and_drop(group, strategy, paths)
            if rank.number == 1:
                rank.native.limit_device_memory(limit + (4096 if kind == "device" else 0))  # a record's
            try:
                with pytest.raises(torch.OutOfMemoryError):
                    dict(load(group, strategy, paths))
            finally:
                rank.native.limit_device_memory(1 << 40)
            gc.collect()
            use_and_drop(group, strategy, paths)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["both"])
def test_a_rank_without_memory_fails_all(ranks: Ranks, mixed: list[Path], kind: str, strategy: str) -> None:
    ranks.call(one_has_no_memory, kind, strategy, mixed)


def memory_is_bounded(rank: Rank, kind: str, strategy: str, path: Path) -> tuple[float, float]:
    """Device memory beyond the tensors, in blocks: of a consumer that drops, and of one that keeps."""
    block = 1 << 20
    rank.seed(SEED, longest_us=2000)
    with rank.group(kind) as group, settings.override(device_block_bytes=block, slot_bytes=64 << 10):
        rank.native.reset_peak(0)
        for _, tensor in load(group, strategy, [path]):
            tensor.cpu()  # far slower than reading, which must wait for it
            del tensor
        dropping = rank.native.peak_bytes(0) / block
        gc.collect()
        rank.native.synchronize(0)
        rank.native.reset_peak(0)
        got = dict(load(group, strategy, [path]))
        keeping = (rank.native.peak_bytes(0) - 1.02 * sum(tensor.nbytes for tensor in got.values())) / block
        del got
    return dropping, keeping


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_device_memory_beyond_the_tensors_is_a_few_blocks(
    ranks: Ranks, tmp_path: Path, kind: str, strategy: str
) -> None:
    path = write_tensors(tmp_path / "t.safetensors", [(f"{i}", "BF16", [1000, 33]) for i in range(300)])
    for dropping, keeping in ranks.call(memory_is_bounded, kind, strategy, path):
        assert dropping <= 4.1  # in hand, travelling, being read, and the next one's memory; records
        assert keeping <= 1.1
