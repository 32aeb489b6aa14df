"""Candidates take turns at loading, while there is time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from weightload.tune_candidates import IN_FORCE, MOST_RUNS, Candidate

Clock = Callable[[], float]
Seconds = dict[Candidate, list[float]]

# Times the settings in force: what takes longer twice is not tried again, and what takes much longer is cut off.
HOPELESS, CUT_OFF = 2, 4
LEAST_LIMIT_S = 1.0


class Loader(Protocol):
    """Loads of one sample (``tune_loads.Loads``)."""

    def seconds(self, candidate: Candidate, state: str, limit_s: float) -> float | None: ...
    def fill_page_cache(self, limit_s: float) -> bool: ...


def take_turns(tried: Sequence[Candidate], loads: Loader, state: str, until: float, clock: Clock) -> Seconds:
    """Seconds of loads of each candidate, in rotating order, begun only if they are likely to end in time.

    Args:
        tried: the candidates, the settings in force among them.
        loads: what loads.
        state: of the page cache.
        until: when to end, by the clock. A load that is under way then is stopped.
        clock: gives seconds.
    """
    seconds: Seconds = {}
    cost: dict[Candidate, float] = {}  # of a load and what is done before it
    live = list(tried)
    for number in range(MOST_RUNS):
        turn = number % len(live)
        for candidate in live[turn:] + live[:turn]:
            begin = clock()
            left = until - begin
            if left <= 0 or cost.get(candidate, cost.get(IN_FORCE, 0.0)) > left:
                return seconds
            usual = max(seconds.get(IN_FORCE, ()), default=None)
            limit = left if usual is None else min(left, max(LEAST_LIMIT_S, CUT_OFF * usual))
            took = loads.seconds(candidate, state, limit)
            cost[candidate] = clock() - begin
            if took is not None:
                seconds.setdefault(candidate, []).append(took)
            own = seconds.get(candidate, ())
            hopeless = usual is not None and len(own) > 1 and min(own) > HOPELESS * usual
            if candidate != IN_FORCE and (took is None or hopeless):
                live.remove(candidate)
    return seconds
