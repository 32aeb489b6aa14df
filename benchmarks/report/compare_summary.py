"""The figures of compare_loaders.py that tables and pictures show, and what they come to in one line a scenario."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from loaders.peers import BASELINES, OURS

UNLIKELY = 0.05  # an order of two loaders' times that chance gives no more often than this is no chance

Row = dict[str, Any]
Scenario = dict[str, Any]


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median, least and most, and quartiles of these times, in seconds."""
    if not seconds:
        return dict.fromkeys(("median_s", "best_s", "worst_s", "quartile1_s", "quartile3_s"))
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "median_s": statistics.median(seconds),
        "best_s": min(seconds),
        "worst_s": max(seconds),
        "quartile1_s": quartiles[0],
        "quartile3_s": quartiles[2],
    }


def summarise(scenario: Scenario, facts: dict[str, Row], total: int) -> Scenario:
    """Adds the figures to a scenario, in place.

    A loader that gave wrong bytes in any load has no time in any scenario. One that failed keeps those from before.
    """
    for limit in scenario["limits"]:
        limit |= spread(limit["seconds"])
        limit["gb_per_s"] = total / 1e9 / limit["median_s"] if limit["seconds"] else None
    held = [limit for limit in scenario["limits"] if limit["held_against"] and limit["seconds"]]
    fastest = min(held, key=lambda limit: float(limit["median_s"]), default=None)
    scenario["limit"] = fastest["limit"] if fastest else None
    scenario["limit_gb_per_s"] = fastest["gb_per_s"] if fastest else None
    for row in scenario["rows"]:
        row |= facts.get(row["loader"], {})
        if row["wrong"]:
            row["seconds"], row["heat_seconds"], row["fresh_seconds"] = [], [], []
        row |= spread(row["seconds"])
        row["fresh_s"] = statistics.median(row["fresh_seconds"]) if row["fresh_seconds"] else None
        row["cpu_s"] = statistics.median(row["cpu_seconds"]) if row["cpu_seconds"] else None
        row["touch_s"] = statistics.median(row["touch_seconds"]) if row["touch_seconds"] else None
        median = row["median_s"]
        row["gb_per_s"] = total / 1e9 / median if median else None
        row["of_limit"] = fastest["median_s"] / median if median and fastest else None
    medians = {row["loader"]: row["median_s"] for row in scenario["rows"]}
    baseline = medians.get(scenario.get("baseline") or BASELINES.get(scenario["kind"]))
    chosen = best_of_each(scenario["rows"])
    for row in scenario["rows"]:
        row["speedup"] = baseline / row["median_s"] if baseline and row["median_s"] else None
        row["best_setting"] = row in chosen
    scenario["verdict"] = verdict(scenario)
    return scenario


def best_of_each(rows: Iterable[Row]) -> list[Row]:
    """The fastest row of each one's settings that went on after the heats; the fastest first."""
    best: dict[str, Row] = {}
    for row in sorted(
        (row for row in rows if row["median_s"] and not row["dropped_after_heats"]),
        key=lambda row: float(row["median_s"]),
    ):
        best.setdefault(row["of"], row)
    return list(best.values())


def doubt(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """A note on the verdict on two loaders, where chance may have given it."""
    if 2 / math.comb(len(ours) + len(theirs), len(ours)) > UNLIKELY:  # however far apart they are
        fewest = min(len(ours), len(theirs))
        return f" (of only {fewest} load{'s' if fewest > 1 else ''})"
    return " (within the spread)" if by_chance(ours, theirs) > UNLIKELY else ""


def by_chance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How often times this far from mixed come up if nobody is faster: the exact rank-sum test, two-sided."""
    every = sorted([*ours, *theirs])
    # Twice the mean rank of equal times, which is a whole number.
    ranks = {seconds: bisect_left(every, seconds) + bisect_right(every, seconds) + 1 for seconds in every}
    # In how many ways a number of all times have a sum of ranks.
    ways: list[Counter[int]] = [Counter({0: 1}), *(Counter[int]() for _ in ours)]
    for seconds in every:
        for taken in range(len(ours), 0, -1):
            for total, count in ways[taken - 1].items():
                ways[taken][total + ranks[seconds]] += count
    mean = len(ours) * (len(every) + 1)
    apart = abs(sum(ranks[seconds] for seconds in ours) - mean)
    found = sum(count for total, count in ways[-1].items() if abs(total - mean) >= apart)
    return found / math.comb(len(every), len(ours))


def verdict(scenario: Scenario) -> str:
    """Say who is first, by how much, and where weightload stands."""
    if scenario["reason"]:
        return f"not measured: {scenario['reason']}"
    ranked = best_of_each(scenario["rows"])
    if not ranked:
        return "nobody was measured"
    ours = next((row for row in ranked if row["of"] == OURS), None)
    first = f"first: {ranked[0]['loader']}"
    if ours is None:
        return f"{first}; weightload was NOT MEASURED"
    others = [row for row in ranked if row is not ours]
    limit = f"; of the limit {ours['of_limit']:.2f}" if ours["of_limit"] else ""
    if not others:
        return f"{first}; nobody else was measured{limit}"
    ratio = others[0]["median_s"] / ours["median_s"]
    noise = doubt(ours["seconds"], others[0]["seconds"])
    if ours is ranked[0]:
        return f"{first}, {ratio:.2f}x as fast as {others[0]['loader']}{noise}{limit}"
    return f"{first}; weightload LOSES: {ours['loader']} is {ratio:.2f}x as fast{noise}{limit}"
