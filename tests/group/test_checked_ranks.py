"""verify= of ranks that load together: each file is hashed once, and what one rank finds is an error on all of them."""

from __future__ import annotations

import hashlib
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ranks import scenarios
from support.ranks.groups import (
    TUNED,
    World,
    assert_done,
    assert_same_failure,
    assert_whole,
    drained,
    fresh_world,
    run_ranks,
    world,
)

# On the CPU of one node "auto" has the ranks agree, and each read for itself.
STRATEGIES = ["auto", "broadcast", "striped"]


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest, checkpoint: list[Path], names: list[str]) -> Iterator[World]:
    """Ranks that must be able to load together after the test."""
    failed = request.session.testsfailed
    ours = world(request.param)
    yield ours
    if request.session.testsfailed > failed:
        ours.close()
        return
    assert_whole(check(ours, checkpoint, right(checkpoint), "striped"), names)


def right(files: list[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wrong(files: list[Path], number: int) -> dict[str, str]:
    return right(files) | {files[number].name: "0" * 64}


def check(ranks: World, files: list[Path], verify: Any, strategy: str, **options: Any) -> list[scenarios.Outcome]:
    everyone = list(range(ranks.size))  # a group that was named: its ranks agree whatever the strategy
    options |= {"files": files, "verify": verify, "strategy": strategy, "tuned": TUNED, "ranks": everyone}
    return ranks.run(scenarios.checked, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_file_is_hashed_by_one_rank(ranks: World, checkpoint: list[Path], names: list[str], strategy: str) -> None:
    outcomes = check(ranks, checkpoint, right(checkpoint), strategy)
    assert_whole(outcomes, names)
    hashed = [result.hashed for result in drained(outcomes)]
    assert sorted(name for names_here in hashed for name in names_here) == [path.name for path in checkpoint]
    assert max(map(len, hashed)) == 2 // (ranks.size - 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_wrong_digest_is_every_ranks_error(
    ranks: World, checkpoint: list[Path], names: list[str], strategy: str, number: int
) -> None:
    outcomes = check(ranks, checkpoint, wrong(checkpoint, number), strategy)
    failure = assert_same_failure(outcomes, "ChecksumError", number % ranks.size)
    assert failure.filename == str(checkpoint[number])
    assert failure.message.count(str(checkpoint[number])) == 1
    assert "0" * 64 in failure.message
    assert right(checkpoint)[checkpoint[number].name] in failure.message
    assert drained(outcomes)[0].names == names


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("other", ["none", "digest"])
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_check_other_things_are_told(
    ranks: World, checkpoint: list[Path], strategy: str, other: str, rank: int
) -> None:
    verify = None if other == "none" else wrong(checkpoint, 1)
    outcomes = check(ranks, checkpoint, right(checkpoint), strategy, per_rank={rank: {"verify": verify}})
    failure = assert_same_failure(outcomes, "RankDisagreementError", None)
    assert "verify=" in failure.message
    assert "disk" not in failure.message
    assert drained(outcomes)[0].names == []


def test_one_rank_knows_no_digest(ranks: World, checkpoint: list[Path]) -> None:
    outcomes = check(ranks, checkpoint, right(checkpoint), "striped", per_rank={1: {"verify": right(checkpoint[:2])}})
    failure = assert_same_failure(outcomes, "CheckpointError", 1)
    assert failure.filename == str(checkpoint[2])


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_copy_that_another_rank_has_is_not_taken_for_checked(
    ranks: World, checkpoint: list[Path], tmp_path: Path, strategy: str, damaged: bool
) -> None:
    copies = [Path(shutil.copy(path, tmp_path)) for path in checkpoint]
    if damaged:
        data = bytearray(copies[0].read_bytes())
        data[-1] ^= 1
        copies[0].write_bytes(data)
    outcomes = check(ranks, checkpoint, right(checkpoint), strategy, per_rank={1: {"files": copies}})
    failure = assert_same_failure(outcomes, "RankDisagreementError", None)
    assert "files on disk" in failure.message
    assert "verify= (" not in failure.message


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("right_digests", [True, False])
def test_ranks_that_want_other_tensors(
    ranks: World, checkpoint: list[Path], names: list[str], strategy: str, right_digests: bool
) -> None:
    verify = right(checkpoint) if right_digests else wrong(checkpoint, 2)
    outcomes = check(ranks, checkpoint, verify, strategy, per_rank={1: {"names": names[:300]}, 0: {"names": names[9:]}})
    results = drained(outcomes)
    assert results[0].names == names[9:]
    assert results[1].names == names[:300]
    for result in results:
        assert (result.error is None) == right_digests
        assert result.error is None or result.error.kinds[0] == "ChecksumError"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_in_common_or_nothing_at_all(
    ranks: World, checkpoint: list[Path], names: list[str], strategy: str
) -> None:
    for theirs in (names[200:], []):
        per_rank = {rank: {"names": theirs if rank else names[:100] if theirs else []} for rank in range(ranks.size)}
        for verify, fails in ((right(checkpoint), False), (wrong(checkpoint, 0), True)):
            for result in drained(check(ranks, checkpoint, verify, strategy, per_rank=per_rank)):
                assert (result.error is not None) == fails, result.error


# Leaving, dying


@pytest.mark.parametrize("ranks", [3], indirect=True)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", ["break", "close", "raise", "collect"])
@pytest.mark.parametrize("after", [1, 200, 384])
def test_a_rank_that_leaves_ends_the_others_and_waits_for_no_hashing(
    ranks: World, checkpoint: list[Path], strategy: str, how: str, after: int
) -> None:
    per_rank = {1: {"leave": (how, after), "hold": True}}
    outcomes = check(ranks, checkpoint, right(checkpoint), strategy, per_rank=per_rank)
    results = drained(outcomes)
    assert len(results[1].names) == after
    for rank, result in enumerate(results):
        if rank != 1:
            assert result.error is not None
            assert result.error.kinds[0] == "RankLeftError", result.error
            assert result.error.rank == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupt_while_others_wait_for_the_verdict(
    ranks: World, checkpoint: list[Path], names: list[str], strategy: str
) -> None:
    options = {"files": checkpoint, "verify": right(checkpoint), "strategy": strategy, "ranks": range(ranks.size)}
    ranks.start(scenarios.checked, per_rank={1: {"hold": True, "pause": [str(len(names))]}}, **options)
    ranks.wait_until(1, str(len(names)))
    ranks.go_on(1)
    for rank in range(ranks.size):
        ranks.wait_until_idle(rank)
    ranks.signal(1, signal.SIGINT)
    results = drained([ranks.outcome(rank) for rank in range(ranks.size)])
    for rank, result in enumerate(results):
        assert result.names == names
        assert result.error is not None
        assert result.error.kinds[0] == ("KeyboardInterrupt" if rank == 1 else "RankLeftError"), result.error


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_that_dies_while_others_wait_for_the_verdict(
    checkpoint: list[Path], names: list[str], strategy: str
) -> None:
    with fresh_world(3) as ranks:
        options = {"files": checkpoint, "verify": right(checkpoint), "strategy": strategy, "ranks": range(3)}
        ranks.start(scenarios.checked, per_rank={1: {"hold": True, "pause": [str(len(names))]}}, **options)
        ranks.wait_until(1, str(len(names)))
        ranks.wait_until_idle(0)
        ranks.wait_until_idle(2)
        ranks.signal(1, signal.SIGKILL)
        for result in drained([ranks.outcome(rank) for rank in (0, 2)]):
            assert result.names == names
            assert result.error is not None
            assert result.error.kinds[0] == "GroupError", result.error
            assert "check of the files" in result.error.message


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_that_cannot_be_hashed(ranks: World, checkpoint: list[Path], strategy: str) -> None:
    per_rank = {1: {"fail": True}}
    outcomes = check(ranks, checkpoint, right(checkpoint), strategy, per_rank=per_rank, names=[])
    failure = assert_same_failure(outcomes, "ReadError", 1)
    assert failure.filename == str(checkpoint[1])
    assert failure.message.count(str(checkpoint[1])) == 1
    assert "Input/output error" in failure.message


# load_into


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_load_into(ranks: World, checkpoint: list[Path], strategy: str) -> None:
    def run(verify: Any, per_rank: dict[int, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        options = {"files": checkpoint, "strategy": strategy, "verify": verify, "per_rank": per_rank}
        return [outcome.value for outcome in ranks.run(scenarios.load_checked, **options)]

    for ended in run(right(checkpoint)):
        assert ended == {"error": None, "wrong": []}
    for number in range(3):
        for ended in run(wrong(checkpoint, number)):
            assert ended["error"].kinds[0] == "ChecksumError", ended["error"]
            assert ended["error"].filename == str(checkpoint[number])
            assert ended["error"].rank == number % ranks.size
            assert right(checkpoint)[checkpoint[number].name] in ended["error"].message
    for other in (None, wrong(checkpoint, 2)):
        for ended in run(right(checkpoint), {1: {"verify": other}}):
            assert "RankDisagreementError" in ended["error"].kinds, ended["error"]
            assert "verify=" in ended["error"].message


SHARDS = """
import hashlib
from weightload import errors
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
import safetensors.torch

path = sys.argv[4]
os.environ["LOCAL_WORLD_SIZE"] = sys.argv[5]  # torchrun's: whether all ranks are on one node
digest = hashlib.sha256(open(path, "rb").read()).hexdigest()
name = os.path.basename(path)
for ways in ([Shard(0)], [Replicate()]):
    mesh = init_device_mesh("cpu", (size,))
    whole = safetensors.torch.load_file(path)
    def target():
        return {key: distribute_tensor(torch.zeros_like(t), mesh, ways) for key, t in whole.items()}
    into = target()
    weightload.load_into(into, path, verify={name: digest})
    assert all(torch.equal(tensor.full_tensor(), whole[key]) for key, tensor in into.items())
    for verify, kind in (({name: "0" * 64}, errors.ChecksumError), (None, errors.RankDisagreementError)):
        try:
            weightload.load_into(target(), path, verify=verify if kind is errors.ChecksumError or rank == 1 else
                                 {name: digest})
        except kind as error:
            assert kind is errors.ChecksumError or "verify=" in str(error), error
        else:
            raise SystemExit("no error")
dist.barrier()
dist.destroy_process_group()
print("done")
"""


@pytest.mark.parametrize("on_one_node", [True, False])
def test_shards(checkpoint: list[Path], tmp_path: Path, on_one_node: bool) -> None:
    assert_done(run_ranks(SHARDS, 3, tmp_path, checkpoint[0], 3 if on_one_node else 1))


NODES = """
import hashlib
from weightload import errors
from weightload._verify import checker

os.environ["GROUP_RANK"] = str(rank // 2)
os.environ.pop("LOCAL_WORLD_SIZE", None)
paths = sys.argv[4:]
digests = {os.path.basename(path): hashlib.sha256(open(path, "rb").read()).hexdigest() for path in paths}
hashed = []
real = checker.check
checker.check = lambda file, *rest: (hashed.append(file.path), real(file, *rest))
for strategy in ("striped", "broadcast"):
    for verify in (digests, digests | {os.path.basename(paths[1]): "0" * 64}):
        hashed.clear()
        try:
            dict(weightload.safetensors_weights_iterator(
                paths, device="cpu", group=dist.group.WORLD, strategy=strategy, verify=verify))
            assert verify is digests
            assert sorted(hashed) == sorted(paths), hashed
        except errors.ChecksumError:
            assert verify is not digests
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_over_several_nodes_every_rank_checks_what_it_sees(checkpoint: list[Path], tmp_path: Path) -> None:
    assert_done(run_ranks(NODES, 3, tmp_path, *checkpoint))
