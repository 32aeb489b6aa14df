"""What follows from measured seconds: which settings are worth changing. Pure: no loads, no clock."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from weightload.tune_candidates import IN_FORCE, LEAST_AGAIN, LEAST_RUNS, Candidate

Outcome = Literal["faster", "slower", "same", "unknown"]
Runs = Mapping[Candidate, Sequence[float]]
States = Mapping[str, Runs]
"""Seconds of each load of each candidate, by the state of the page cache: ``"cold"``, ``"warm"``."""

LEAST_GAIN = 1.10  # times as fast
# How often chance alone may bring about what is recommended, in each comparison with the settings in force. There are
# four at most, two candidates in two states: 2 % in all, however loads of the same kind scatter.
MOST_CHANCE = 0.005
# The same where two such differences, in opposite directions, are needed.
MOST_CHANCE_OF_TWO = 0.025
# Of several values that are faster, the one nearest to that in force is taken if it comes this near the fastest.
NEARLY = 1.05


def spread(seconds: Sequence[float]) -> float:
    """How far runs of the same thing lie apart: the range of their middle half, in seconds."""
    if len(seconds) < 2:
        return 0.0
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return high - low


def compare(before: Sequence[float], after: Sequence[float], least_seconds: float = 0.0) -> Outcome:
    """Whether ``after`` is another time than ``before``: by LEAST_GAIN, by more than either spreads, by least_seconds.

    Nothing is faster before it was measured LEAST_RUNS times; one run is enough to be slower.
    """
    if len(before) < LEAST_RUNS or not after:
        return "unknown"
    old, new = statistics.median(before), statistics.median(after)
    noise = max(spread(before), spread(after), least_seconds)
    if new * LEAST_GAIN <= old and old - new > noise:
        return "faster" if len(after) >= LEAST_RUNS else "unknown"
    if new >= old * LEAST_GAIN and new - old > noise:
        return "slower"
    return "same"


def chance(before: Sequence[float], after: Sequence[float]) -> float:
    """How often two series of the same thing have the second one as far before the first, or further.

    The exact rank test of Mann and Whitney, one-sided, which asks nothing of how seconds are distributed. Equal seconds
    count against ``after``.
    """
    behind = sum(new >= old for new in after for old in before)
    as_far = sum(_orders(len(after), len(before), pairs) for pairs in range(behind + 1))
    return as_far / math.comb(len(after) + len(before), len(after))


@functools.cache
def _orders(after: int, before: int, pairs: int) -> int:
    """In how many orders of so many loads of each there are so many pairs with the one of ``after`` behind."""
    if pairs < 0 or not after or not before:
        return int(pairs == 0)
    # The last load of the order is one of ``after``, behind all of ``before``; or one of ``before``.
    return _orders(after - 1, before, pairs - before) + _orders(after, before - 1, pairs)


def confirm(before: Sequence[float], after: Sequence[float], least_seconds: float = 0.0) -> Outcome:
    """``compare`` for what came out best of many: faster only after LEAST_AGAIN loads of each, and hardly by chance."""
    found = compare(before, after, least_seconds)
    if found != "slower" and min(len(before), len(after)) < LEAST_AGAIN:
        return "unknown"
    return "same" if found == "faster" and chance(before, after) > MOST_CHANCE else found


def differ(before: Sequence[float], after: Sequence[float], least_seconds: float = 0.0) -> Outcome:
    """``compare`` for what is told of one state beside another, after one measurement: hardly by chance either way."""
    found = compare(before, after, least_seconds)
    by_chance = {"faster": chance(before, after), "slower": chance(after, before)}.get(found, 0.0)
    return "same" if by_chance > MOST_CHANCE_OF_TWO else found


Rule = Callable[[Sequence[float], Sequence[float], float], Outcome]


def outcomes(
    states: States, candidate: Candidate, least_seconds: float = 0.0, rule: Rule = compare
) -> dict[str, Outcome]:
    """Comparisons with the settings in force, by state."""
    return {
        state: rule(runs.get(IN_FORCE, ()), runs.get(candidate, ()), least_seconds) for state, runs in states.items()
    }


def is_better(states: States, candidate: Candidate, least_seconds: float = 0.0, rule: Rule = compare) -> bool:
    """Faster in one state of the page cache, and slower in none."""
    found = outcomes(states, candidate, least_seconds, rule).values()
    return "faster" in found and "slower" not in found


def gain(states: States, candidate: Candidate) -> float:
    """How many times as fast as the settings in force: the geometric mean over the states it was measured in."""
    logs = [
        math.log(statistics.median(runs[IN_FORCE]) / statistics.median(runs[candidate]))
        for runs in states.values()
        if runs.get(IN_FORCE) and runs.get(candidate)
    ]
    return math.exp(statistics.fmean(logs)) if logs else 1.0


def shortlist(states: States, tried: Sequence[Candidate], least_seconds: float = 0.0) -> list[Candidate]:
    """The best value of each setting that has a better one, the best setting first."""
    better: dict[str, list[Candidate]] = {}
    for candidate in tried:
        if candidate.changes and is_better(states, candidate, least_seconds):
            better.setdefault(candidate.changes[0][0], []).append(candidate)
    chosen = []
    for same_setting in better.values():
        best = max(gain(states, candidate) for candidate in same_setting)
        # In the order given, which begins near the value in force.
        chosen.append(next(one for one in same_setting if gain(states, one) * NEARLY >= best))
    return sorted(chosen, key=lambda candidate: -gain(states, candidate))


def to_confirm(chosen: Sequence[Candidate]) -> list[Candidate]:
    """What to measure again, against the settings in force: the best change alone, and all changes together."""
    together = Candidate(tuple(change for candidate in chosen for change in candidate.changes))
    return [*chosen[:1], together] if len(chosen) > 1 else list(chosen)


def verdict(states: States, confirming: Sequence[Candidate], least_seconds: float = 0.0) -> Candidate:
    """What to recommend after measuring again: IN_FORCE for nothing. All changes only where they beat the best one."""
    better = [candidate for candidate in confirming if is_better(states, candidate, least_seconds, confirm)]
    if len(better) == 2 and gain(states, better[1]) < gain(states, better[0]) * NEARLY:
        return better[0]
    return better[-1] if better else IN_FORCE


def undecided(states: States, confirming: Sequence[Candidate], least_seconds: float = 0.0) -> bool:
    """Whether more loads might have led to a recommendation: not slower anywhere, and loaded too seldom in a state."""
    found = [outcomes(states, candidate, least_seconds, confirm).values() for candidate in confirming]
    return any("slower" not in one and ("unknown" in one or not one) for one in found)
