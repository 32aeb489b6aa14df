"""Ranks that are killed, stopped, interrupted or late during a shared load: nobody hangs, everybody learns why."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from support.ranks import scenarios
from support.ranks.groups import STRATEGIES, TUNED, World, assert_whole, fresh_world, run_ranks

TIMEOUT = 4.0  # seconds, of the groups of ranks that find out by it
# How the ranks of a load are found: they are given; torchrun says that all are on this node; they ask one another.
GROUPS = [("broadcast", "given"), ("striped", "launched"), ("broadcast", "launched"), ("striped", "asked")]


def assert_lost(ours: World, rank: int, checkpoint: list[Path], stage: str) -> scenarios.Drained:
    """A rank has noticed that the group is broken, and says in which load and where."""
    outcome = ours.outcome(rank)
    result = outcome.value
    assert isinstance(result, scenarios.Drained)
    assert result.error is not None
    assert "GroupError" in result.error.kinds, result.error
    message = result.error.message
    assert str(checkpoint[0]) in message or checkpoint[0].name in message, message
    assert re.search(rf"\b{len(checkpoint)} files", message), message
    assert re.search(stage, message), message
    assert result.wrong == []
    return result


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_between_two_tensors(checkpoint: list[Path], names: list[str], strategy: str, rank: int) -> None:
    with fresh_world(3, dict.fromkeys(range(3), TIMEOUT)) as ours:
        per_rank = {rank: {"pause": ["30"]}}
        ours.start(scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED, per_rank=per_rank)
        ours.wait_until(rank, "30")
        ours.signal(rank, signal.SIGKILL)
        for other in {0, 1, 2} - {rank}:
            result = assert_lost(ours, other, checkpoint, r"block \d+ of \d+")
            assert result.names == names[: len(result.names)]
            assert len(result.names) < len(names)
        assert ours.exit_status(rank) == -signal.SIGKILL


@pytest.mark.parametrize(("strategy", "rank"), [("broadcast", 0), ("striped", 1)])
def test_a_rank_killed_while_it_reads(checkpoint: list[Path], names: list[str], strategy: str, rank: int) -> None:
    """The others wait for its bytes."""
    with fresh_world(2) as ours:
        slow_load(ours, checkpoint, strategy, rank, 10**6)
        ours.signal(rank, signal.SIGKILL)
        result = assert_lost(ours, 1 - rank, checkpoint, r"block \d+ of \d+")
        assert result.names == names[: len(result.names)]


def slow_load(ours: World, checkpoint: list[Path], strategy: str, slow: int, delay_ms: int) -> None:
    """Ranks 0 and 1 are in the middle of a load: one waits for the other, whose every read takes so long by now."""
    fault = {"fault": "delay", "first": 40, "count": 10**6, "delay_ms": delay_ms}
    per_rank = {slow: {"fault": fault}, 1 - slow: {"pause": ["5"]}}
    ours.start(scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED, per_rank=per_rank)
    ours.wait_until(1 - slow, "5")  # the agreement is behind them
    ours.go_on(1 - slow)
    ours.wait_until_idle(1 - slow)


def late_call(ours: World, checkpoint: list[Path], strategy: str, group: str, **of_rank_0: object) -> None:
    """Rank 0 begins a load, and rank 1 is about to."""
    options = {"ranks": [0, 1]} if group == "given" else {}
    ours.start(scenarios.load, files=checkpoint, strategy=strategy, pause=["call"], per_rank={0: of_rank_0}, **options)
    ours.wait_until(0, "call")
    ours.wait_until(1, "call")
    ours.go_on(0)


@pytest.mark.parametrize(("strategy", "group"), GROUPS)
def test_a_rank_killed_before_it_calls(checkpoint: list[Path], strategy: str, group: str) -> None:
    with fresh_world(2, launched=group != "asked") as ours:
        late_call(ours, checkpoint, strategy, group)
        ours.wait_until_idle(0)
        ours.signal(1, signal.SIGKILL)
        assert assert_lost(ours, 0, checkpoint, "agreement").names == []


@pytest.mark.parametrize(("strategy", "group"), GROUPS)
def test_a_rank_that_never_calls(checkpoint: list[Path], strategy: str, group: str) -> None:
    with fresh_world(2, {0: TIMEOUT}, group != "asked") as ours:
        late_call(ours, checkpoint, strategy, group)
        outcome = ours.outcome(0)
        failure = outcome.value.error
        assert "GroupError" in failure.kinds, failure
        assert "agreement" in failure.message, failure
        assert checkpoint[0].name in failure.message, failure
        assert outcome.value.names == []
        # When it does call at last, it is told too.
        ours.go_on(1)
        late = ours.outcome(1)
        assert "GroupError" in late.value.error.kinds, late.value.error
        assert late.value.names == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_stopped_mid_load(checkpoint: list[Path], names: list[str], strategy: str) -> None:
    """A stopped process keeps its connections: only the group's timeout tells. Continued, it is told as well."""
    with fresh_world(2, {0: TIMEOUT}) as ours:
        ours.start(scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED, pause=["30"])
        ours.wait_until(0, "30")
        ours.wait_until(1, "30")
        ours.signal(1, signal.SIGSTOP)
        ours.go_on(0, 1)
        result = assert_lost(ours, 0, checkpoint, r"block \d+ of \d+")
        assert result.names == names[: len(result.names)]
        assert len(result.names) < len(names)
        ours.signal(1, signal.SIGCONT)
        assert_lost(ours, 1, checkpoint, r"block \d+ of \d+")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ctrl_c_on_a_rank_that_waits_for_a_late_one(checkpoint: list[Path], names: list[str], strategy: str) -> None:
    """The interrupt does not wait for the late rank, and that is told when it comes."""
    with fresh_world(2) as ours:
        per_rank = {0: {"pause": ["30"]}, 1: {"farewell": True}}
        ours.start(scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED, per_rank=per_rank)
        ours.wait_until(0, "30")
        ours.wait_until_idle(1)
        ours.signal(1, signal.SIGINT)
        outcome = ours.outcome(1)  # while the other is late
        assert outcome.value.error.kinds[0] == "KeyboardInterrupt", outcome.value.error
        assert outcome.value.wrong == []
        ours.go_on(0)
        result = assert_lost(ours, 0, checkpoint, "")
        assert result.names == names[: len(result.names)]
        assert len(result.names) < len(names)
        assert_whole(ours.run(scenarios.load, files=checkpoint, strategy=strategy, tuned=TUNED), names)


@pytest.mark.parametrize(("strategy", "slow"), [("broadcast", 0), ("striped", 0), ("striped", 1)])
def test_ctrl_c_on_a_rank_that_waits_for_a_slow_one(checkpoint: list[Path], strategy: str, slow: int) -> None:
    """The slow rank reads on: it learns of it at its next block."""
    with fresh_world(2) as ours:
        slow_load(ours, checkpoint, strategy, slow, 300)
        ours.signal(1 - slow, signal.SIGINT)
        outcome = ours.outcome(1 - slow)
        assert outcome.value.error.kinds[0] == "KeyboardInterrupt", outcome.value.error
        assert_lost(ours, slow, checkpoint, "")


@pytest.mark.parametrize(("strategy", "group"), GROUPS)
def test_ctrl_c_before_the_other_rank_has_called(checkpoint: list[Path], strategy: str, group: str) -> None:
    with fresh_world(2, {1: TIMEOUT}, group != "asked") as ours:
        late_call(ours, checkpoint, strategy, group, farewell=True)
        ours.wait_until_idle(0)
        ours.signal(0, signal.SIGINT)
        outcome = ours.outcome(0)  # while the other is late
        assert outcome.value.error.kinds[0] == "KeyboardInterrupt", outcome.value.error
        ours.go_on(1)
        assert assert_lost(ours, 1, checkpoint, "").names == []


@pytest.mark.parametrize("destroy", [False, True])
def test_interpreter_exit_with_an_unfinished_load(checkpoint: list[Path], tmp_path: Path, destroy: bool) -> None:
    """On all ranks, under both strategies at once, with the groups destroyed before or not at all."""
    script = """
        limits = weightload.settings.override(block_bytes=65536, task_bytes=16384, window_bytes=262144)
        groups = [dist.new_group(), dist.new_group()]
        with limits:
            loads = [
                weightload.safetensors_weights_iterator(sys.argv[5:], device="cpu", group=group, strategy=strategy)
                for group, strategy in zip(groups, ["broadcast", "striped"])
            ]
        kept = [next(load) for load in loads for _ in range(9)]
        loads.append(loads)
        print("leaving", flush=True)
        if sys.argv[4] == "True":
            dist.destroy_process_group()
    """
    for status, output in run_ranks(script, 2, tmp_path, destroy, *checkpoint):
        assert status == 0, output
        assert "leaving" in output
        assert "Error" not in output


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_whose_script_fails_takes_no_other_down_with_it(
    checkpoint: list[Path], tmp_path: Path, strategy: str
) -> None:
    """An exception that nobody catches ends its process; the other learns of it and may end as it likes."""
    script = """
        seen = 0
        try:
            with weightload.settings.override(block_bytes=65536, task_bytes=16384, window_bytes=262144):
                for _ in weightload.safetensors_weights_iterator(sys.argv[5:], device="cpu", strategy=sys.argv[4]):
                    seen += 1
                    if rank == 1 and seen == 30:
                        raise ArithmeticError("the consumer's own")
        except weightload.errors.GroupError as error:
            print("told:", type(error).__name__, str(error))
            sys.exit(7)
    """
    (first, told), (second, own) = run_ranks(script, 2, tmp_path, strategy, *checkpoint)
    assert (first, second) == (7, 1), (told, own)
    assert "told:" in told
    assert "ArithmeticError: the consumer's own" in own
