"""What tune tries, how it spends its time and what it concludes: with seconds and a clock that are made up."""

from __future__ import annotations

import itertools
import math
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_tensors

from weightload import tune as tune_module
from weightload import tune_report
from weightload.settings import MIB, Settings
from weightload.tune import tune
from weightload.tune_candidates import (
    IN_FORCE,
    LEAST_AGAIN,
    LEAST_SAMPLE,
    MOST_SAMPLE,
    Candidate,
    candidates,
    fit,
    least_loads,
)
from weightload.tune_loads import Checkpoint, Sample
from weightload.tune_result import Tuning
from weightload.tune_storage import NotColdError
from weightload.tune_turns import take_turns
from weightload.tune_verdict import chance, compare, confirm, differ, is_better, shortlist, to_confirm, verdict

EIGHT = Candidate((("threads", 8),))
SIXTEEN = Candidate((("threads", 16),))
SMALL_TASKS = Candidate((("task_bytes", 2 * MIB),))
STEADY = [1.0, 1.01, 0.99, 1.0]


def times(factor: float) -> list[float]:
    return [second * factor for second in STEADY]


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        (STEADY, times(0.8), "faster"),
        (STEADY, times(1.25), "slower"),
        (STEADY, times(0.95), "same"),  # not 10 %
        (STEADY, STEADY, "same"),
        ([1.0, 1.6, 0.7, 1.3], [0.8, 0.82, 0.81], "same"),  # the settings in force vary more than that
        (STEADY, [0.4, 0.85, 1.2, 0.7], "same"),  # the candidate does
        (STEADY, [0.7, 0.71], "unknown"),  # too few
        (STEADY[:2], times(0.5), "unknown"),
        (STEADY, [], "unknown"),
        (STEADY, [3.0], "slower"),  # one is enough for that
        ([*STEADY, 9.0], [*times(0.8), 7.0], "faster"),  # one outlier each
    ],
)
def test_two_series_of_seconds(before: list[float], after: list[float], outcome: str) -> None:
    assert compare(before, after) == outcome


def test_differences_that_nobody_feels_count_for_nothing() -> None:
    assert compare(times(0.005), times(0.004), least_seconds=0.02) == "same"
    assert compare(times(0.5), times(0.4), least_seconds=0.02) == "faster"


def recommendations(sigma: float, at_first: int, again: int, often: int, times_as_fast: float = 1.0) -> Counter[str]:
    """What is recommended, how often, where loads scatter by ``sigma`` and only threads=8 makes any difference.

    Nine candidates of three settings, cold and warm, by the functions that tune decides with.
    """
    generator = random.Random(f"{sigma} {at_first} {again} {times_as_fast}")
    names = ["threads"] * 4 + ["task_bytes"] * 2 + ["window_bytes"] * 2
    tried = [IN_FORCE, *(Candidate(((name, 8 + number),)) for number, name in enumerate(names))]

    def measure(candidates: list[Candidate], loads: int) -> dict[str, dict[Candidate, list[float]]]:
        def seconds(one: Candidate) -> list[float]:
            usual = 1 / times_as_fast if ("threads", 8) in one.changes else 1
            return [usual * generator.lognormvariate(0, sigma) for _ in range(loads)]

        return {state: {one: seconds(one) for one in candidates} for state in ("cold", "warm")}

    found: Counter[str] = Counter()
    for _ in range(often):
        confirming = to_confirm(shortlist(measure(tried, at_first), tried))
        chosen = verdict(measure([IN_FORCE, *confirming], again), confirming)
        found["nothing" if chosen == IN_FORCE else "threads" if ("threads", 8) in chosen.changes else "others"] += 1
    return found


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2, 0.35])
@pytest.mark.parametrize(("at_first", "again"), [(3, 5), (5, 5), (5, 9)])
def test_noise_recommends_nothing(sigma: float, at_first: int, again: int) -> None:
    """Candidates that are all the same thing."""
    assert recommendations(sigma, at_first, again, 3000)["nothing"] > 2940


@pytest.mark.parametrize(("at_first", "again"), [(3, 5), (5, 5), (5, 9)])
def test_what_is_clearly_faster_is_found_in_noise(at_first: int, again: int) -> None:
    found = recommendations(0.1, at_first, again, 300, times_as_fast=1.5)
    assert found["threads"] >= 290, found


def test_fewer_loads_than_it_takes_recommend_nothing() -> None:
    assert recommendations(0.1, 5, LEAST_AGAIN - 1, 200, times_as_fast=3) == {"nothing": 200}


def test_how_often_chance_alone_puts_one_series_before_another() -> None:
    """By counting all orders of the loads of two series."""
    assert chance([2.0] * 5, [1.0] * 5) == 1 / 252
    assert chance([1.0] * 5, [1.0] * 5) == 1  # equal seconds tell nothing
    assert chance([1.0, 2.0], []) == 1
    for old, new in ((3, 3), (4, 2), (5, 5), (2, 6)):
        ranks = range(old + new)
        orders = [set(after) for after in itertools.combinations(ranks, new)]
        behind = [sum(b < a for a in after for b in ranks if b not in after) for after in orders]
        for after, pairs in zip(orders, behind, strict=True):
            series = [float(rank) for rank in ranks if rank not in after], [float(rank) for rank in after]
            assert chance(*series) == sum(other <= pairs for other in behind) / len(orders)


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        ([*STEADY, 1.02], [*times(0.8), 0.8], "faster"),
        (STEADY, [*times(0.8), 0.8], "unknown"),
        ([*STEADY, 1.02], times(0.8), "unknown"),
        (STEADY, STEADY, "unknown"),
        ([*STEADY, 1.02], [*times(0.8), 1.005], "same"),  # of five, one that is no faster is too many
        ([*STEADY, *STEADY, 1.02], [*times(0.8), *times(0.8), 1.005], "faster"),  # of nine it is not
        ([*STEADY, 1.02], [*times(0.95), 0.95], "same"),
        (STEADY, [3.0], "slower"),
    ],
)
def test_two_series_of_seconds_measured_again(before: list[float], after: list[float], outcome: str) -> None:
    assert confirm(before, after) == outcome


def test_a_trade_off_is_told_only_if_chance_hardly_makes_one() -> None:
    assert differ(STEADY, times(0.8)) == "faster"
    assert differ(STEADY, times(1.25)) == "slower"
    assert differ(STEADY[:3], times(0.8)[:3]) == "same"
    assert differ(STEADY[:3], [3.0]) == "same"
    assert differ(STEADY, times(0.8)[:2]) == "unknown"


def test_faster_in_one_state_and_slower_in_the_other_is_not_better() -> None:
    cold = {IN_FORCE: STEADY, EIGHT: times(0.5)}
    assert is_better({"cold": cold}, EIGHT)
    assert is_better({"cold": cold, "warm": {IN_FORCE: STEADY, EIGHT: times(1.05)}}, EIGHT)
    assert is_better({"cold": cold, "warm": {IN_FORCE: STEADY}}, EIGHT)
    assert not is_better({"cold": cold, "warm": {IN_FORCE: STEADY, EIGHT: times(1.5)}}, EIGHT)
    assert not is_better({"warm": {IN_FORCE: STEADY, EIGHT: STEADY}}, EIGHT)


def test_the_nearest_of_values_that_are_as_good_is_taken() -> None:
    runs = {IN_FORCE: STEADY, EIGHT: times(0.6), SIXTEEN: times(0.59), SMALL_TASKS: times(0.5)}
    assert shortlist({"cold": runs}, [IN_FORCE, EIGHT, SIXTEEN, SMALL_TASKS]) == [SMALL_TASKS, EIGHT]
    runs[SIXTEEN] = times(0.4)
    assert shortlist({"cold": runs}, [IN_FORCE, EIGHT, SIXTEEN, SMALL_TASKS]) == [SIXTEEN, SMALL_TASKS]
    assert shortlist({"cold": dict.fromkeys(runs, STEADY)}, list(runs)) == []


def test_all_changes_together_are_taken_where_they_beat_the_best_one() -> None:
    both = Candidate((("threads", 8), ("task_bytes", 2 * MIB)))
    assert to_confirm([]) == []
    assert to_confirm([EIGHT]) == [EIGHT]
    assert to_confirm([EIGHT, SMALL_TASKS]) == [EIGHT, both]

    def times(factor: float) -> list[float]:
        return [second * factor for second in (*STEADY, 1.02)]

    for one, together, chosen in ((0.7, 0.5, both), (0.7, 0.69, EIGHT), (1.0, 0.7, both), (0.7, 1.3, EIGHT),
                                  (1.0, 0.98, IN_FORCE)):  # fmt: skip
        runs = {IN_FORCE: times(1), EIGHT: times(one), both: times(together)}
        assert verdict({"cold": runs}, [EIGHT, both]) == chosen, (one, together)
    assert verdict({}, [EIGHT]) == IN_FORCE


def test_candidates_are_single_changes_of_what_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightload.settings.usable_cpus", lambda: 6)

    def values(now: Settings, name: str, accelerator: bool = False) -> list[object]:
        return [one.changes[0][1] for one in candidates(now, accelerator)[1:] if one.changes[0][0] == name]

    now = Settings(threads=4)
    assert candidates(now, False)[0] == IN_FORCE
    assert values(now, "threads") == [0, 8, 16, 2, 32, 1]  # 0, the default, is 6 here
    assert values(now, "task_bytes") == [2 * MIB, 32 * MIB]
    assert values(now, "window_bytes") == [64 * MIB, 1024 * MIB]
    assert values(now, "read") == []
    assert {one.changes[0][0] for one in candidates(now, True)[1:]} == {
        "threads", "read", "slot_bytes", "device_block_bytes", "pinned_bytes"
    }  # fmt: skip
    assert values(now, "read", True) == ["buffered", "direct"]
    assert values(Settings(task_bytes=MIB), "task_bytes") == [8 * MIB, 256 << 10, 4 * MIB]  # the default is among them
    assert 0 not in values(Settings(threads=6), "threads")  # the same
    assert values(Settings(pinned_bytes=8 * MIB), "slot_bytes", True) == [2 * MIB]  # the ring must hold a slot
    for one in candidates(Settings(threads=64, task_bytes=4096, window_bytes=4096), False):
        Settings(**dict(one.changes))


def test_slow_storage_gets_small_loads_then_few_candidates() -> None:
    tried = candidates(Settings(threads=4), False)
    assert MOST_SAMPLE <= 3 * 10**9
    for speed, seconds in ((3e9, 20), (3e8, 20), (5e7, 20), (5e7, 60), (1e6, 20)):
        size, kept = fit(tried, speed, seconds, 100 << 30)
        assert LEAST_SAMPLE <= size <= MOST_SAMPLE
        assert kept == tried[: len(kept)]
        if len(kept) > 1:
            assert size * sum(least_loads(len(kept))) <= speed * seconds
    assert fit(tried, 3e9, 20, 100 << 30)[1] == tried
    assert 1 < len(fit(tried, 5e7, 60, 100 << 30)[1]) < len(tried)
    assert [least_loads(number) for number in (1, 2, 9)] == [(3, 5), (6, 10), (27, 15)]
    assert fit(tried, 1e6, 20, 100 << 30)[1] == [IN_FORCE]
    assert fit(tried, 1e6, 20, 1000) == (1000, tried)


def test_available_memory() -> None:
    assert 1 << 20 < tune_module._available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Machine:
    """A clock, and loads that take as long as they are told to."""

    def __init__(self, speed: float = 1e9, factors: dict[Candidate, float] | None = None) -> None:
        self.now, self.speed, self.factors = 100.0, speed, factors or {}
        self.loads: list[tuple[str, Candidate]] = []
        self.bytes: list[int] = []
        self.latest = 0.0
        self.overhead = 0.01
        self.cold_fails_after: int | None = None
        self.slower_from = math.inf
        self.again: dict[Candidate, float] = {}
        """Factors once a candidate has been loaded as often as in one phase."""

    def clock(self) -> float:
        return self.now

    def make(self, sample: Sample, device: torch.device) -> Machine:
        self.size = sample.bytes
        return self

    def _wait(self, took: float, limit_s: float) -> bool:
        self.now += min(took, max(0.0, limit_s)) + self.overhead
        self.latest = self.now
        return took <= limit_s

    def seconds(self, candidate: Candidate, state: str, limit_s: float) -> float | None:
        self.loads.append((state, candidate))
        self.bytes.append(self.size)
        if state == "cold" and self.cold_fails_after is not None and len(self.loads) > self.cold_fails_after:
            raise NotColdError("somebody maps them")
        speed = self.speed * (1 if state == "cold" else 10)
        factor = self.factors.get(candidate, 1.0)
        if self.loads.count((state, candidate)) > 9:
            factor = self.again.get(candidate, factor)
        took = self.size / speed * factor
        if self.now >= self.slower_from:
            took *= 20
        return took if self._wait(took, limit_s) else None

    def fill_page_cache(self, limit_s: float) -> bool:
        return self._wait(self.size / self.speed, limit_s)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tuning]:
    """``tune`` on a made-up machine, with a made-up checkpoint of 20 GB in tensors of 10 MB."""
    path = write_tensors(tmp_path / "m.safetensors", [("w", "U8", [8])])

    def go(machine: Machine, seconds: float = 45, why_not_cold: str | None = None, total: int = 20 * 10**9) -> Tuning:
        tensors = tuple((str(path), f"{number}", 10**7) for number in range(total // 10**7))
        monkeypatch.setattr(tune_module, "checkpoint_of", lambda _: Checkpoint(tensors, total))
        monkeypatch.setattr(tune_module, "why_never_cold", lambda _: why_not_cold)
        monkeypatch.setattr(tune_module, "_available_memory", lambda: 64 << 30)
        monkeypatch.setattr(tune_module.settings, "usable_cpus", lambda: 4)
        return tune([str(path)], torch.device("cpu"), seconds, clock=machine.clock, make_loads=machine.make)

    return go


@pytest.mark.parametrize("speed", [1e6, 2e7, 5e7, 3e8, 3e9, 3e10])
@pytest.mark.parametrize("why_not_cold", [None, "no"])
def test_the_time_is_kept_whatever_the_storage(
    run: Callable[..., Tuning], speed: float, why_not_cold: str | None
) -> None:
    for factors in ({}, {EIGHT: 0.5}, {EIGHT: 50.0}):
        machine = Machine(speed, factors)
        done = run(machine, why_not_cold=why_not_cold)
        assert machine.latest <= 145 + 2 * machine.overhead
        assert done.seconds_taken <= 45 + 2 * machine.overhead
        assert set(done.measured) <= ({"warm"} if why_not_cold else {"cold", "warm"})
        # At 20 MB/s there is no time for eight cold loads of two candidates.
        expected = EIGHT if factors.get(EIGHT) == 0.5 and speed > (1e6 if why_not_cold else 2e7) else IN_FORCE
        assert done.recommended == expected
        assert not done.undecided
        assert max(machine.bytes, default=0) <= MOST_SAMPLE


def test_a_clear_win_is_measured_again_and_recommended(run: Callable[..., Tuning]) -> None:
    machine = Machine(1e9, {EIGHT: 0.6, SMALL_TASKS: 0.8})
    done = run(machine)
    assert done.ahead == [EIGHT, SMALL_TASKS]
    assert done.recommended == EIGHT  # together they are no faster: the factor of both is 1
    assert set(done.again) == {"cold", "warm"}
    text = "\n".join(tune_report.lines(done))
    assert "  export WEIGHTLOAD_THREADS=8" in text
    assert "1.67 times as fast cold" in text
    assert "measured again" in text


def test_what_wins_only_once_is_not_recommended(run: Callable[..., Tuning]) -> None:
    machine = Machine(1e10, {EIGHT: 0.6})
    machine.overhead, machine.again = 0.0, {EIGHT: 1.0}
    done = run(machine)
    assert done.ahead == [EIGHT]
    assert done.recommended == IN_FORCE
    assert "threads 8 came out ahead at first and, measured again, did not" in "\n".join(tune_report.lines(done))


def test_what_there_is_no_time_to_load_again_is_not_recommended(run: Callable[..., Tuning]) -> None:
    machine = Machine(1e9, {EIGHT: 0.6})
    machine.slower_from = machine.now + 0.7 * 45  # somebody else uses the storage
    done = run(machine)
    assert done.ahead == [EIGHT]
    for again in done.again.values():
        assert len(again.get(EIGHT, [])) < LEAST_AGAIN
    assert (done.recommended, done.undecided) == (IN_FORCE, True)
    said = tune_report.lines(done)[-1]
    assert said.startswith("Nothing is recommended: threads 8 came out ahead at first")
    assert "5 times" in said
    assert tune_report.as_json(done)["undecided"]


def test_nothing_wins(run: Callable[..., Tuning]) -> None:
    done = run(Machine(1e9))
    assert done.ahead == []
    assert done.again == {}
    assert "The settings in force are right here" in tune_report.lines(done)[-1]
    assert tune_report.exports(done) == []


def test_storage_that_is_too_slow_is_said_to_be(run: Callable[..., Tuning]) -> None:
    done = run(Machine(1e6))
    assert not done.compared
    assert "Nothing to say" in tune_report.lines(done)[-1]
    done = run(Machine(5e7))
    assert done.left_out
    assert any(line.startswith("No time for ") for line in tune_report.lines(done))


def test_files_that_stay_in_the_page_cache_on_the_way(run: Callable[..., Tuning]) -> None:
    for after in (0, 1, 30):
        machine = Machine(1e9, {EIGHT: 0.5})
        machine.cold_fails_after = after
        done = run(machine)
        assert done.why_not_cold == "somebody maps them"
        assert set(done.measured) == {"warm"}
        assert "no cold loads: somebody maps them" in "\n".join(tune_report.lines(done))


def test_turns_rotate_and_hopeless_candidates_leave() -> None:
    machine = Machine(1e9, {SIXTEEN: 2.5, SMALL_TASKS: 60.0})
    machine.size = 10**9
    seconds = take_turns([IN_FORCE, EIGHT, SIXTEEN, SMALL_TASKS], machine, "cold", 145, machine.clock)
    order = [candidate for _, candidate in machine.loads]
    assert order[:4] == [IN_FORCE, EIGHT, SIXTEEN, SMALL_TASKS]
    assert order[4:7] == [EIGHT, SIXTEEN, IN_FORCE]
    assert order[7:9] == [IN_FORCE, EIGHT]
    assert len(seconds[SIXTEEN]) == 2
    assert SMALL_TASKS not in seconds  # cut off
    assert machine.latest <= 145
