"""Loads whose reading the ranks of a group share give every rank, bit for bit, what safetensors gives."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from conftest import start, write_tensors
from support.ranks import scenarios
from support.ranks.groups import STRATEGIES, TUNED, assert_whole, drained, world

ALL_STRATEGIES = [*STRATEGIES, "auto", "independent"]
SIZES = [2, 3, 4]
CHECKPOINTS = ["every dtype", "mixed", "one tiny file", "many files", "many tensors", "nothing to read", "no file"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, all_dtypes: Path, mixed: list[Path]) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("group")
    many = [(f"layer.{i}.weight", "BF16", [i % 7, 5]) for i in range(5000)]
    seven = [
        write_tensors(
            folder / f"{f}.safetensors", [(f"{f}.{i}", "U8", [f * 1000 + i]) for i in range(f % 3 + 1)], seed=f
        )
        for f in range(7)
    ]
    return {
        "every dtype": [all_dtypes],
        "mixed": mixed,  # odd sizes; hundreds of tiny tensors, empty ones too; one far larger than a block, a scalar
        "one tiny file": [write_tensors(folder / "tiny.safetensors", [("only", "U8", [1])])],
        "many files": seven,
        "many tensors": [write_tensors(folder / "many.safetensors", many)],
        "nothing to read": [write_tensors(folder / "empty.safetensors", [("a", "F32", [0]), ("b", "U8", [3, 0])])],
        "no file": [],
    }


def names_of(files: list[Path]) -> list[str]:
    """Names in the order that this process alone gets them."""
    return [name for name, _ in start(files)]


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("strategy", ALL_STRATEGIES)
@pytest.mark.parametrize("size", SIZES)
def test_every_rank_gets_the_bytes(checkpoints: dict[str, list[Path]], size: int, strategy: str, name: str) -> None:
    files = checkpoints[name]
    for tuned in ({}, TUNED):
        outcomes = world(size).run(scenarios.load, files=files, strategy=strategy, tuned=tuned)
        assert_whole(outcomes, names_of(files))


@pytest.mark.parametrize("strategy", ALL_STRATEGIES)
@pytest.mark.parametrize("size", SIZES)
def test_the_real_checkpoint(real_checkpoint: Path, size: int, strategy: str) -> None:
    tuned = {"block_bytes": 1 << 20, "window_bytes": 4 << 20}
    for settings in ({}, tuned):
        outcomes = world(size).run(scenarios.load, files=[real_checkpoint], strategy=strategy, tuned=settings)
        assert_whole(outcomes, names_of([real_checkpoint]))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tuned", [{"block_bytes": 4096}, {"block_bytes": 10_000, "task_bytes": 5000}])
def test_any_cutting_gives_the_same_bytes(mixed: list[Path], strategy: str, tuned: dict[str, int]) -> None:
    """Blocks smaller than most tensors, and stripes that no file offset is a multiple of."""
    assert_whole(world(3).run(scenarios.load, files=mixed, strategy=strategy, tuned=tuned), names_of(mixed))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_short_reads_and_interrupts_are_continued(mixed: list[Path], strategy: str) -> None:
    for kind in ("short_read", "interrupt"):
        fault = {"fault": kind, "first": 8, "count": 40}
        outcomes = world(2).run(scenarios.load, files=mixed, strategy=strategy, tuned=TUNED, fault=fault)
        assert_whole(outcomes, names_of(mixed))


@pytest.mark.parametrize("strategy", ALL_STRATEGIES)
def test_a_selection(mixed: list[Path], strategy: str) -> None:
    every = names_of(mixed)
    for names in (every[5::7], [*every[10:12], "large"], [every[-1]], []):
        outcomes = world(3).run(scenarios.load, files=mixed, strategy=strategy, tuned=TUNED, names=names)
        assert_whole(outcomes, [name for name in every if name in names])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_is_files_then_offsets(tmp_path: Path, strategy: str) -> None:
    first = write_tensors(tmp_path / "z.safetensors", [("c", "U8", [3]), ("a", "U8", [0]), ("b", "U8", [2])])
    second = write_tensors(tmp_path / "a.safetensors", [("e", "U8", [1]), ("d", "F32", [1])])
    outcomes = world(2).run(scenarios.load, files=[first, second], strategy=strategy)
    assert_whole(outcomes, ["c", "a", "b", "e", "d"])


@pytest.mark.parametrize("strategy", ALL_STRATEGIES)
@pytest.mark.parametrize("ranks", [[1, 3], [2, 1], [3, 0, 2], [2]])
def test_a_group_whose_ranks_are_not_the_worlds(mixed: list[Path], strategy: str, ranks: list[int]) -> None:
    """Ranks of the group are not global ranks. The others take no part."""
    if ranks != sorted(ranks) and "sort_ranks" not in inspect.signature(dist.new_group).parameters:
        pytest.skip("this torch sorts the ranks of a group")
    outcomes = world(4).run(
        scenarios.load, files=mixed, strategy=strategy, tuned=TUNED, ranks=ranks, fault=scenarios.STAND_BY
    )
    assert_whole(outcomes, names_of(mixed))
    assert len(drained(outcomes)) == len(ranks)
    if strategy == "broadcast":
        reads = {rank: outcomes[rank].value.reads for rank in ranks}
        assert max(reads, key=lambda rank: reads[rank]) == ranks[0], reads


def test_all_ranks_and_two_subgroups_one_after_another(mixed: list[Path]) -> None:
    for ranks in (None, [0, 1], [2, 3], [0, 1, 2, 3], None):
        outcomes = world(4).run(scenarios.load, files=mixed, strategy="striped", tuned=TUNED, ranks=ranks)
        assert_whole(outcomes, names_of(mixed))


@pytest.mark.parametrize("size", [2, 4])
def test_every_byte_is_read_once_by_the_group(shards: list[Path], size: int) -> None:
    outcomes = world(size).run(
        scenarios.count_reads, files=shards, tuned=TUNED, strategies=["independent", "broadcast", "striped"]
    )
    counts = [outcome.value for outcome in outcomes]
    least = sum(path.stat().st_size for path in shards) // TUNED["task_bytes"]
    alone = counts[0]["independent"]
    assert [count["broadcast"] for count in counts[1:]] == [0] * (size - 1)
    assert least <= counts[0]["broadcast"] <= 1.5 * alone
    together = [count["striped"] for count in counts]
    assert least <= sum(together) <= 1.5 * alone
    assert max(together) <= 1.5 * sum(together) / size


@pytest.mark.parametrize("strategy", ["broadcast", "striped"])
def test_each_rank_counts_what_it_read_itself(shards: list[Path], strategy: str) -> None:
    stats = [outcome.value for outcome in world(2).run(scenarios.stats_of, files=shards, strategy=strategy)]
    assert all({"agreement", "collective", "consumer"} < set(rank["stages"]) for rank in stats)
    read = [sum(file["bytes"] for file in rank["files"]) for rank in stats]
    assert sum(read) == stats[0]["bytes"] == stats[1]["bytes"]
    assert (read[1] == 0) == (strategy == "broadcast")


@pytest.mark.parametrize("options", [{"to_cpu": True, "device": None}, {"broadcast": False}])
def test_loads_that_never_communicate(mixed: list[Path], options: dict[str, object]) -> None:
    """One rank alone may call them, whatever the others do meanwhile."""
    for ranks in ([0], [1]):
        outcomes = world(2).run(scenarios.alone, files=mixed, who=ranks[0], options=options)
        assert_whole(outcomes, names_of(mixed))
        assert len(drained(outcomes)) == 1


@pytest.mark.parametrize("strategy", ["broadcast", "striped", "auto"])
def test_load_into_a_module(tmp_path: Path, strategy: str) -> None:
    shapes = [(100, 300), (300, 7), (7, 7), (7, 1), (1, 2000)]
    module = torch.nn.Sequential(*(torch.nn.Linear(wide, high) for wide, high in shapes))
    path = tmp_path / "module.safetensors"
    safetensors.torch.save_file(module.state_dict(), path)
    for outcome in world(2).run(scenarios.load_module, files=[path], strategy=strategy, shapes=shapes):
        assert outcome.value["wrong"] == []
        assert outcome.value["loaded"] == names_of([path])
        assert outcome.value["bytes"] == sum(tensor.nbytes for tensor in module.state_dict().values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_may_differ_in_what_does_not_shape_the_plan(mixed: list[Path], strategy: str) -> None:
    outcomes = world(2).run(
        scenarios.load,
        files=mixed,
        strategy=strategy,
        per_rank={0: {"tuned": TUNED}, 1: {"tuned": {**TUNED, "threads": 5}}},
    )
    assert_whole(outcomes, names_of(mixed))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_group_may_be_used_between_the_tensors(mixed: list[Path], strategy: str) -> None:
    outcomes = world(3).run(scenarios.load, files=mixed, strategy=strategy, tuned=TUNED, reduce=True)
    assert_whole(outcomes, names_of(mixed))


@pytest.mark.parametrize("how", ["threads", "interleaved"])
@pytest.mark.parametrize("strategies", [("striped", "broadcast"), ("broadcast", "broadcast"), ("striped", "striped")])
def test_two_loads_at_once_on_different_groups(mixed: list[Path], how: str, strategies: tuple[str, str]) -> None:
    outcomes = world(2).run(scenarios.two_at_once, files=mixed, how=how, strategies=strategies, tuned=TUNED)
    for outcome in outcomes:
        for result in outcome.value:
            assert result.error is None, result.error
            assert (result.names, result.wrong) == (names_of(mixed), [])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_loads_at_once_on_the_same_group(mixed: list[Path], strategy: str) -> None:
    """The second either works or is refused in words, alike on every rank; the first is not disturbed."""
    outcomes = world(2).run(scenarios.second_on_the_same_group, files=mixed, strategy=strategy, tuned=TUNED)
    seconds = []
    for outcome in outcomes:
        first, second = outcome.value
        assert first.error is None, first.error
        assert (first.names, first.wrong) == (names_of(mixed), [])
        assert second.wrong == []
        assert second.names == ([] if second.error else names_of(mixed))
        assert second.error is None or "group" in second.error.message
        seconds.append((second.names, second.error))
    assert seconds[0] == seconds[1]


def test_two_loads_back_to_back(mixed: list[Path]) -> None:
    for strategy in STRATEGIES * 2:
        assert_whole(world(2).run(scenarios.load, files=mixed, strategy=strategy, tuned=TUNED), names_of(mixed))
