"""A failure on one rank of a shared load is raised on all of them at once, and the group works afterwards."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tensors
from support.ranks import scenarios
from support.ranks.groups import STRATEGIES, TUNED, World, assert_same_failure, assert_whole, drained, world

COARSE = {**TUNED, "block_bytes": 262_144}
SIZE = 128 * 16_384  # bytes of tensors in a file of the checkpoint
Overrides = dict[int, dict[str, Any]]


@pytest.fixture
def three(request: pytest.FixtureRequest, checkpoint: list[Path], names: list[str]) -> Iterator[World]:
    """Three ranks, which must be able to load together after the test."""
    failed = request.session.testsfailed
    ours = world(3)
    yield ours
    if request.session.testsfailed > failed:  # no more of these ranks
        ours.close()
        return
    for strategy in STRATEGIES:
        outcomes = ours.run(scenarios.load, files=checkpoint[:1], strategy=strategy, tuned=COARSE)
        assert_whole(outcomes, names[:128])


def disagree(three: World, files: list[Path], per_rank: Overrides, strategy: str, words: str) -> None:
    """Rank 1 differs: every rank is told so, in the same words, before it gets anything."""
    outcomes = three.run(scenarios.load, files=files, strategy=strategy, tuned=TUNED, per_rank=per_rank)
    failure = assert_same_failure(outcomes, "RankDisagreementError", None)
    assert re.search(r"\branks? 1\b", failure.message), failure.message
    assert re.search(words, failure.message, re.IGNORECASE), failure.message
    assert drained(outcomes)[0].names == []


# Errors of one rank


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_file_missing_on_one_rank(
    three: World, checkpoint: list[Path], tmp_path: Path, strategy: str, rank: int
) -> None:
    per_rank = {rank: {"files": [checkpoint[0], tmp_path / "missing.safetensors"], "reference": checkpoint}}
    outcomes = three.run(scenarios.load, files=checkpoint, strategy=strategy, per_rank=per_rank)
    failure = assert_same_failure(outcomes, "FileNotFoundError", rank)
    assert failure.filename == str(tmp_path / "missing.safetensors")
    assert failure.errno == 2
    assert drained(outcomes)[0].names == []


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_header_on_one_rank(
    three: World, checkpoint: list[Path], tmp_path: Path, strategy: str, rank: int
) -> None:
    bad = tmp_path / "1.safetensors"
    bad.write_bytes(checkpoint[1].read_bytes().replace(b'"dtype": "U8"', b'"dtype": "X8"', 1))
    per_rank = {rank: {"files": [checkpoint[0], bad, checkpoint[2]], "reference": checkpoint}}
    outcomes = three.run(scenarios.load, files=checkpoint, strategy=strategy, per_rank=per_rank)
    failure = assert_same_failure(outcomes, "UnknownDtype", rank)
    assert failure.filename == str(bad)
    assert "X8" in failure.message
    assert drained(outcomes)[0].names == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_of_another_size_under_the_same_header(
    three: World, checkpoint: list[Path], tmp_path: Path, strategy: str
) -> None:
    longer = tmp_path / "0.safetensors"
    longer.write_bytes(checkpoint[0].read_bytes() + b"more")
    per_rank = {1: {"files": [longer, *checkpoint[1:]], "reference": checkpoint}}
    outcomes = three.run(scenarios.load, files=checkpoint, strategy=strategy, per_rank=per_rank)
    assert assert_same_failure(outcomes, "MetadataIncompleteBuffer", 1).filename == str(longer)


@pytest.mark.parametrize("first", [6, 20, 60])
@pytest.mark.parametrize(("strategy", "rank"), [("broadcast", 0), ("striped", 0), ("striped", 1), ("striped", 2)])
def test_an_io_error_mid_load(
    three: World, checkpoint: list[Path], names: list[str], strategy: str, rank: int, first: int
) -> None:
    fault = {"fault": "error", "first": first, "count": 10**6, "error_number": 5}
    outcomes = three.run(
        scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED, per_rank={rank: {"fault": fault}}
    )
    failure = assert_same_failure(outcomes, "ReadError", rank)
    assert "OSError" in failure.kinds
    assert failure.errno == 5
    read_somewhere(failure, checkpoint, names, drained(outcomes)[0].names)


@pytest.mark.parametrize("fault", ["error", "end_of_file", "short_read", "interrupt"])
@pytest.mark.parametrize(("strategy", "rank"), [("broadcast", 0), ("striped", 1)])
def test_a_fault_at_every_read_of_a_rank(
    three: World, checkpoint: list[Path], names: list[str], strategy: str, rank: int, fault: str
) -> None:
    """Headers and digest too: the same error on every rank, or, for what is continued, everything."""
    large = {"block_bytes": 524_288, "task_bytes": 262_144, "window_bytes": 1_048_576, "threads": 2}
    files, failed = checkpoint[:1], 0
    for first in range(40):
        plan = {"fault": fault, "first": first, "count": 1, "error_number": 5}
        outcomes = three.run(
            scenarios.load, files=files, strategy=strategy, tuned=large, per_rank={rank: {"fault": plan}}
        )
        if drained(outcomes)[0].error is None:
            assert_whole(outcomes, names[:128])
        else:
            failed += 1
            assert assert_same_failure(outcomes, "ReadError", rank).filename == str(files[0])
        if outcomes[rank].value.reads <= first:
            break
    else:
        raise AssertionError("more reads than expected")
    assert failed == (0 if fault in ("short_read", "interrupt") else first)


def read_somewhere(failure: scenarios.Failure, files: list[Path], names: list[str], before: list[str]) -> None:
    """The error of a read says where, and what came before it is what came before that place."""
    assert failure.filename in [str(path) for path in files]
    assert failure.filename in failure.message
    assert failure.tensor is not None
    assert failure.tensor in failure.message
    assert failure.tensor.split(".")[0] == Path(failure.filename).stem
    assert failure.offset is not None
    assert 0 < failure.offset < SIZE + 16_384
    assert before == names[: len(before)]
    assert failure.tensor not in before


@pytest.mark.parametrize(("strategy", "rank"), [("broadcast", 0), ("striped", 1)])
def test_the_file_is_named_as_the_rank_does_that_could_not_read_it(
    three: World, checkpoint: list[Path], tmp_path: Path, strategy: str, rank: int
) -> None:
    own = [Path(shutil.copy(path, tmp_path)) for path in checkpoint]  # as on its own disk
    fault = {"fault": "error", "first": 20, "count": 10**6, "error_number": 5}
    outcomes = three.run(
        scenarios.load,
        files=checkpoint,
        strategy=strategy,
        tuned=TUNED,
        per_rank={rank: {"files": own, "fault": fault}},
    )
    assert assert_same_failure(outcomes, "ReadError", rank).filename in map(str, own)


@pytest.mark.parametrize(("strategy", "rank"), [("broadcast", 0), ("striped", 1)])
def test_an_early_end_of_file_mid_load(
    three: World, checkpoint: list[Path], names: list[str], strategy: str, rank: int
) -> None:
    fault = {"fault": "end_of_file", "first": 40, "count": 10**6}
    outcomes = three.run(
        scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED, per_rank={rank: {"fault": fault}}
    )
    failure = assert_same_failure(outcomes, "ReadError", rank)
    assert failure.errno is None
    read_somewhere(failure, checkpoint, names, drained(outcomes)[0].names)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_truncated_mid_load(
    three: World, checkpoint: list[Path], names: list[str], tmp_path: Path, strategy: str
) -> None:
    """The file of all ranks, in truth: an error on every rank, and a SIGBUS on none."""
    files = [Path(shutil.copy(path, tmp_path)) for path in checkpoint]
    three.start(scenarios.load, files=files, reference=checkpoint, strategy=strategy, tuned=TUNED, pause=["5"])
    for rank in range(3):
        three.wait_until(rank, "5")
    os.truncate(files[1], 1_000_000)
    three.go_on(0, 1, 2)
    outcomes = [three.outcome(rank) for rank in range(3)]
    results = drained(outcomes)
    assert results[0].error is not None
    failure = assert_same_failure(outcomes, "ReadError", results[0].error.rank)
    assert failure.rank in ([0] if strategy == "broadcast" else [0, 1, 2])
    assert failure.filename == str(files[1])
    assert failure.errno is None
    read_somewhere(failure, files, names, results[0].names)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_errors_of_two_ranks_at_once(three: World, checkpoint: list[Path], tmp_path: Path, strategy: str) -> None:
    """One cause is raised everywhere, not each rank's own."""
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no header")
    per_rank: Overrides = {0: {"files": [tmp_path / "missing"]}, 2: {"files": [bad]}}
    for options in per_rank.values():
        options["reference"] = checkpoint
    outcomes = three.run(scenarios.load, files=checkpoint, strategy=strategy, per_rank=per_rank)
    failure = drained(outcomes)[0].error
    assert failure is not None
    assert_same_failure(outcomes, failure.kinds[0], failure.rank)
    assert failure.rank in (0, 2)


def test_an_io_error_then_a_load_that_succeeds(three: World, checkpoint: list[Path], names: list[str]) -> None:
    fault = {"fault": "error", "first": 10, "count": 10**6, "error_number": 5}
    for strategy in (*STRATEGIES, *STRATEGIES):
        per_rank = {0: {"fault": fault}}
        outcomes = three.run(scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED, per_rank=per_rank)
        assert_same_failure(outcomes, "ReadError", 0)
        assert_whole(three.run(scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED), names)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_target_that_does_not_fit_on_one_rank(three: World, tmp_path: Path, strategy: str) -> None:
    """load_into: the rank whose module differs says why, and no rank waits for it."""
    path = write_tensors(tmp_path / "m.safetensors", [("0.weight", "F32", [3, 4]), ("0.bias", "F32", [3])])
    outcomes = three.run(
        scenarios.load_module_failing, files=[path], strategy=strategy, shape=(4, 3), per_rank={1: {"shape": (5, 3)}}
    )
    assert_same_failure(outcomes, "StateDictError", 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_target_with_nothing_to_load_on_one_rank(three: World, tmp_path: Path, strategy: str) -> None:
    """load_into: a rank whose names are all others takes part in the agreement, which is then none."""
    path = write_tensors(tmp_path / "m.safetensors", [("0.weight", "F32", [3, 4]), ("0.bias", "F32", [3])])
    ours: Overrides = {1: {"under": "other."}}
    outcomes = three.run(
        scenarios.load_module_failing, files=[path], strategy=strategy, shape=(4, 3), strict=False, per_rank=ours
    )
    failure = assert_same_failure(outcomes, "RankDisagreementError", None)
    assert "rank 1 of 3 differs in selection" in failure.message


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ctrl_c_before_the_agreement(three: World, checkpoint: list[Path], strategy: str) -> None:
    """The rank goes at once, without waiting for the others, and they are told."""
    per_rank: Overrides = {1: {"names": scenarios.ctrl_c}}
    outcomes = three.run(scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED, per_rank=per_rank)
    errors = [result.error for result in drained(outcomes)]
    assert all(errors)
    assert ["KeyboardInterrupt" in error.kinds for error in errors if error] == [False, True, False]
    for error in (errors[0], errors[2]):
        assert error is not None
        assert "GroupError" in error.kinds
        assert "rank 1 failed before it began: KeyboardInterrupt" in error.message


# Ranks that do not ask for the same


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_order_of_the_files(three: World, checkpoint: list[Path], strategy: str) -> None:
    disagree(three, checkpoint, {1: {"files": [checkpoint[i] for i in (1, 0, 2)]}}, strategy, "file")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_number_of_files(three: World, checkpoint: list[Path], strategy: str) -> None:
    disagree(three, checkpoint, {1: {"files": checkpoint[:2]}}, strategy, "file")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_header_in_a_file_of_the_same_size(
    three: World, checkpoint: list[Path], tmp_path: Path, strategy: str
) -> None:
    other = tmp_path / "1.safetensors"
    other.write_bytes(checkpoint[1].read_bytes().replace(b'"1.7"', b'"1.x"', 1))
    assert other.stat().st_size == checkpoint[1].stat().st_size
    disagree(three, checkpoint, {1: {"files": [checkpoint[0], other, checkpoint[2]]}}, strategy, "header|content")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_of_another_size(three: World, checkpoint: list[Path], tmp_path: Path, strategy: str) -> None:
    other = write_tensors(tmp_path / "2.safetensors", [("2.0", "U8", [9])])
    disagree(three, checkpoint, {1: {"files": [*checkpoint[:2], other]}}, strategy, "size|bytes|header")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_selection(three: World, checkpoint: list[Path], names: list[str], strategy: str) -> None:
    """Is no disagreement: each rank gets what it wants."""
    wanted = {0: names, 1: names[1:], 2: []}
    per_rank: Overrides = {rank: {"names": some} for rank, some in wanted.items()}
    outcomes = three.run(scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED, per_rank=per_rank)
    for rank, one in enumerate(drained(outcomes)):
        assert one.error is None
        assert one.names == wanted[rank]


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"strategy": "fastest"}, "ValueError", "strategy 'fastest'"),
        ({"backend": "floppy"}, "ValueError", "backend 'floppy'"),
        ({"device": "cuda:1"}, "ValueError", "cannot load to cuda:1"),
        ({"files": [3], "reference": []}, "TypeError", "expected str, bytes or os.PathLike object"),
    ],
)
@pytest.mark.parametrize("ranks", [None, range(3)])
def test_wrong_arguments_of_one_rank(
    three: World, checkpoint: list[Path], wrong: dict[str, Any], kind: str, words: str, ranks: range | None
) -> None:
    if "strategy" in wrong and ranks is None:
        return  # taken for "auto", which does not communicate between CPUs of a node
    outcomes = three.run(
        scenarios.load, files=checkpoint, strategy="striped", tuned=TUNED, ranks=ranks, per_rank={1: wrong}
    )
    failure = assert_same_failure(outcomes, kind, 1)
    assert words in failure.message


def test_ranks_of_a_group_that_each_read_for_themselves_agree_first(
    three: World, checkpoint: list[Path], names: list[str], tmp_path: Path
) -> None:
    outcomes = three.run(scenarios.load, files=checkpoint, strategy="auto", tuned=TUNED, ranks=range(3))
    assert_whole(outcomes, names)
    outcomes = three.run(
        scenarios.load,
        files=checkpoint,
        strategy="striped",
        tuned=TUNED,
        ranks=range(3),
        per_rank={1: {"strategy": "auto"}},
    )
    failure = assert_same_failure(outcomes, "RankDisagreementError", None)
    assert "rank 1 of 3 differs in strategy (independent where the others have striped)" in failure.message
    missing = [checkpoint[0], tmp_path / "missing.safetensors"]
    outcomes = three.run(
        scenarios.load,
        files=checkpoint,
        strategy="auto",
        ranks=range(3),
        per_rank={2: {"files": missing, "reference": []}},
    )
    assert assert_same_failure(outcomes, "FileNotFoundError", 2).filename == str(missing[1])


def test_another_strategy(three: World, checkpoint: list[Path]) -> None:
    disagree(three, checkpoint, {1: {"strategy": "striped"}}, "broadcast", "strategy.*broadcast|strategy.*striped")
    disagree(three, checkpoint, {1: {"strategy": "broadcast"}}, "striped", "strategy.*broadcast|strategy.*striped")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_block_size(three: World, checkpoint: list[Path], strategy: str) -> None:
    disagree(three, checkpoint, {1: {"tuned": {**TUNED, "block_bytes": 32_768}}}, strategy, "block_bytes")


# Ranks that leave


@pytest.mark.parametrize("how", ["break", "close", "raise", "collect"])
@pytest.mark.parametrize(("strategy", "rank"), [("broadcast", 0), ("broadcast", 2), ("striped", 1)])
def test_one_rank_leaves(
    three: World, checkpoint: list[Path], names: list[str], strategy: str, rank: int, how: str
) -> None:
    """The others are told who left by ``break``, ``close()``, an exception of its consumer, or garbage collection."""
    outcomes = three.run(
        scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED, per_rank={rank: {"leave": (how, 30)}}
    )
    results = drained(outcomes)
    assert results[rank].names == names[:30]
    left = results[rank].error
    assert (left.kinds[0] if left else "") == ("ZeroDivisionError" if how == "raise" else "")
    for other in {0, 1, 2} - {rank}:
        failure = results[other].error
        assert failure is not None
        assert failure.kinds[:2] == ["RankLeftError", "GroupError"]
        assert re.search(rf"\brank {rank}\b", failure.message), failure.message
        assert results[other].names == names[: len(results[other].names)]
        assert 30 <= len(results[other].names) < len(names)


@pytest.mark.parametrize("count", [4, 30])
@pytest.mark.parametrize("how", ["break", "close", "raise", "collect"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_leave_at_the_same_place(
    three: World, checkpoint: list[Path], names: list[str], strategy: str, how: str, count: int
) -> None:
    outcomes = three.run(scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED, leave=(how, count))
    for result in drained(outcomes):
        assert result.names == names[:count]
        assert (result.error.kinds[0] if result.error else "") == ("ZeroDivisionError" if how == "raise" else "")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_leaves_at_the_last_tensor(
    three: World, checkpoint: list[Path], names: list[str], strategy: str
) -> None:
    """It has everything, and so have the others: nobody is told off."""
    per_rank = {1: {"leave": ("break", len(names))}}
    assert_whole(three.run(scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED, per_rank=per_rank), names)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "auto"])
def test_a_rank_outside_the_group_is_refused(
    three: World, checkpoint: list[Path], names: list[str], strategy: str
) -> None:
    outcomes = three.run(scenarios.load_of_two, files=checkpoint, strategy=strategy, tuned=TUNED)
    assert_whole(outcomes[:2], names)
    outsider = drained(outcomes)[2]
    assert outsider.error is not None
    assert outsider.error.kinds[0] == "ValueError", outsider.error
    assert outsider.names == []


def test_a_hundred_loads_leave_nothing_open(three: World, checkpoint: list[Path]) -> None:
    """Whole, left and failing ones."""
    outcomes = three.run(scenarios.repeat, files=checkpoint[:1], times=100, tuned=COARSE)
    for before, after in [outcome.value for outcome in outcomes]:
        assert after == before
