"""What tune says: in words with a small table, and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from weightload import settings
from weightload.cli_common import bytes_in_words
from weightload.settings_page import shown
from weightload.tune_candidates import IN_FORCE, LEAST_AGAIN, LEAST_RUNS, Candidate, Value
from weightload.tune_result import Tuning
from weightload.tune_verdict import LEAST_GAIN, spread


def lines(done: Tuning) -> list[str]:
    """The report for people."""
    cold = "cold (put out of it before each load, and verified)"
    states = " and ".join(cold if state == "cold" else state for state in done.measured) or "nothing measured"
    sample = f"{bytes_in_words(done.sample.bytes)} of {bytes_in_words(done.checkpoint_bytes)}"
    touched = ", one byte of each page touched" if done.device == "cpu" else ""
    said = [
        f"loads:       {len(done.sample.names)} tensors, {sample}, in {len(done.sample.files)} file(s)",
        f"to:          {done.device}{touched}; {done.cpus} CPUs may be used",
        f"storage:     {done.storage}",
        f"page cache:  {states}",
    ]
    if done.why_not_cold:
        said.append(f"             no cold loads: {done.why_not_cold}")
    said.append(f"in force:    {_in_force(done)}")
    said.append(f"took:        {done.seconds_taken:.0f} s of at most {done.seconds_allowed:.0f}")
    if done.measured:
        said += ["", *_table(done), "(median +- half the range of the middle half of the loads; how many loads)"]
    if done.left_out:
        left_out = "; ".join(map(str, done.left_out))
        said += ["", f"No time for {left_out}. --seconds gives more."]
    for candidate, faster, slower in done.trade_offs():
        said += ["", f"{candidate}: faster {faster}, slower {slower}. Worth it only where all loads are {faster}."]
    return [*said, "", *_conclusion(done)]


def _in_force(done: Tuning) -> str:
    changed = [
        f"{name} {shown(name, getattr(done.now, name))} ({settings.variable(name)})"
        for name, origin in done.origins.items()
        if origin != "default"
    ]
    return ", ".join(changed) + "; else the defaults" if changed else "the defaults"


def _table(done: Tuning) -> list[str]:
    """GB/s of each candidate: the median of its loads, the spread of their middle half, and how many there were."""
    rows = [["settings", *(f"{state}, GB/s" for state in done.measured)]]
    for candidate in done.tried:
        runs = [seconds.get(candidate, []) for seconds in done.measured.values()]
        rows.append([str(candidate), *(_cell(done, seconds) for seconds in runs)])
    if done.again:
        rows.append(["measured again:", *("" for _ in done.measured)])
        for candidate in dict.fromkeys(one for seconds in done.again.values() for one in (IN_FORCE, *seconds)):
            runs = [done.again.get(state, {}).get(candidate, []) for state in done.measured]
            rows.append([f"  {candidate}", *(_cell(done, seconds) for seconds in runs)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(done: Tuning, seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    rate = _gigabytes_per_second(done, seconds)
    return f"{rate:.2f} +-{spread(seconds) / statistics.median(seconds) / 2:.0%} ({len(seconds)})"


def _gigabytes_per_second(done: Tuning, seconds: Sequence[float]) -> float:
    return done.sample.bytes / 1e9 / statistics.median(seconds)


def _conclusion(done: Tuning) -> list[str]:
    if done.recommended != IN_FORCE:
        faster = [
            f"{_times(runs[IN_FORCE], runs[done.recommended]):.2f} times as fast {state}"
            for state, runs in done.again.items()
            if done.recommended in runs and IN_FORCE in runs
        ]
        return [f"Worth changing (measured twice: {', '.join(faster)}):", *(f"  {line}" for line in exports(done))]
    if not done.compared:
        return [f"Nothing to say: no candidate could be loaded {LEAST_RUNS} times in the time. --seconds gives more."]
    right = "The settings in force are right here"
    rule = f"nothing is faster by {LEAST_GAIN - 1:.0%} and by more than loads of the same kind differ"
    ahead = "; ".join(map(str, done.ahead))
    if done.undecided:
        often = f"there was no time to load it and the settings in force {LEAST_AGAIN} times more each"
        return [f"Nothing is recommended: {ahead} came out ahead at first, but {often}. --seconds gives more."]
    if done.ahead:
        return [f"{right}. {ahead} came out ahead at first and, measured again, did not: {rule}."]
    return [f"{right}: {rule}."]


def _times(before: Sequence[float], after: Sequence[float]) -> float:
    return statistics.median(before) / statistics.median(after)


def exports(done: Tuning) -> list[str]:
    """The recommended changes as lines for a shell."""
    return [_export(name, value) for name, value in done.recommended.changes]


def _export(name: str, value: Value) -> str:
    variable = settings.variable(name)
    return f"unset {variable}" if value == getattr(settings.Settings(), name) else f"export {variable}={value}"


def as_json(done: Tuning) -> dict[str, Any]:
    """The report for machines; seconds of every load."""
    return {
        "device": done.device,
        "cpus": done.cpus,
        "storage": {
            "file_system": done.storage.file_system,
            "source": done.storage.source,
            "kind": done.storage.kind,
        },
        "files": list(done.sample.files),
        "tensors": len(done.sample.names),
        "sample_bytes": done.sample.bytes,
        "checkpoint_bytes": done.checkpoint_bytes,
        "seconds_allowed": done.seconds_allowed,
        "seconds_taken": done.seconds_taken,
        "why_not_cold": done.why_not_cold,
        "in_force": {name: {"value": getattr(done.now, name), "from": origin} for name, origin in done.origins.items()},
        "measured": _measured(done, done.measured),
        "measured_again": _measured(done, done.again),
        "left_out": [dict(candidate.changes) for candidate in done.left_out],
        "compared": done.compared,
        "ahead": [dict(candidate.changes) for candidate in done.ahead],
        "undecided": done.undecided,
        "recommended": dict(done.recommended.changes),
        "shell": exports(done),
    }


def _measured(done: Tuning, states: dict[str, dict[Candidate, list[float]]]) -> list[dict[str, Any]]:
    return [
        {
            "page_cache": state,
            "settings": dict(candidate.changes),
            "seconds": seconds,
            "gigabytes_per_second": _gigabytes_per_second(done, seconds),
        }
        for state, runs in states.items()
        for candidate, seconds in runs.items()
    ]
