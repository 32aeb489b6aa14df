"""What follows from measured seconds: which settings are worth changing. Pure: no loads, no clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from weightload.tune_candidates import IN_FORCE, LEAST_RUNS, Candidate

Outcome = Literal["faster", "slower", "same", "unknown"]
Runs = Mapping[Candidate, Sequence[float]]
States = Mapping[str, Runs]
"""Seconds of each load of each candidate, by the state of the page cache: ``"cold"``, ``"warm"``."""

LEAST_GAIN = 1.10  # times as fast
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


def outcomes(states: States, candidate: Candidate, least_seconds: float = 0.0) -> dict[str, Outcome]:
    """``compare`` with the settings in force, by state."""
    return {
        state: compare(runs.get(IN_FORCE, ()), runs.get(candidate, ()), least_seconds) for state, runs in states.items()
    }


def is_better(states: States, candidate: Candidate, least_seconds: float = 0.0) -> bool:
    """Faster in one state of the page cache, and slower in none."""
    found = outcomes(states, candidate, least_seconds).values()
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
    better = [candidate for candidate in confirming if is_better(states, candidate, least_seconds)]
    if len(better) == 2 and gain(states, better[1]) < gain(states, better[0]) * NEARLY:
        return better[0]
    return better[-1] if better else IN_FORCE
