"""compare_loaders.py sums up seconds, here made-up ones: who is first, how sure that is, what the picture shows."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def a_row(loader: str, of: str, *seconds: float) -> dict[str, Any]:
    nothing: dict[str, Any] = {"fresh_seconds": [], "cpu_seconds": [], "touch_seconds": []}
    nothing |= {"heat_seconds": [], "dropped_after_heats": False, "wrong": None, "reason": None}
    return {"loader": loader, "of": of, "seconds": list(seconds), **nothing}


def summarised(*rows: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    from report.compare_summary import summarise

    limits = [
        {"limit": name, "seconds": seconds, "reason": None, "held_against": held, "dropped_after_heats": False}
        for name, seconds, held in (("slow", [0.5, 0.7], True), ("fast", [0.4], True), ("other", [0.1], False))
    ]
    found = {"kind": "private", "reason": reason, "limits": limits, "rows": list(rows)}
    return summarise(found, {}, total=2 * 10**9)


def test_a_lost_row_says_so() -> None:
    peers = [a_row("safetensors clone", "safetensors", 4, 4, 4), a_row("slow setting", "peer", 3, 3, 3)]
    lost = summarised(a_row("weightload pread", "weightload", 2, 2, 2), a_row("fast setting", "peer", 1, 1, 1), *peers)
    assert lost["verdict"] == (
        "first: fast setting; weightload LOSES: weightload pread is 0.50x as fast (of only 3 loads); of the limit 0.20"
    )
    ours = lost["rows"][0]
    assert (ours["speedup"], ours["of_limit"], ours["gb_per_s"]) == (2, 0.2, 1)
    assert (lost["limit"], lost["limit_gb_per_s"]) == ("fast", 5)
    assert [row["best_setting"] for row in lost["rows"]] == [True, True, True, False]


def test_a_row_that_is_won_says_by_how_much() -> None:
    won = summarised(a_row("weightload pread", "weightload", 1, 1, 1, 1), a_row("other", "peer", 3, 3, 3, 3))
    assert won["verdict"] == "first: weightload pread, 3.00x as fast as other; of the limit 0.40"
    close = summarised(a_row("weightload pread", "weightload", 1, 2, 2, 3), a_row("other", "peer", 2, 2.1, 2.1, 3))
    assert close["verdict"].startswith("first: weightload pread, 1.05x as fast as other (within the spread)")
    few = summarised(a_row("weightload pread", "weightload", 1), a_row("other", "peer", 3, 3))
    assert few["verdict"].startswith("first: weightload pread, 3.00x as fast as other (of only 1 load)")
    assert summarised(a_row("other", "peer", 2))["verdict"] == "first: other; weightload was NOT MEASURED"
    assert summarised(reason="no room")["verdict"] == "not measured: no room"


def test_the_overview_has_a_line_a_scenario() -> None:
    from report.compare_overview import overview

    where = {"place": "disk", "cache": "warm"}
    ours = a_row("weightload pread", "weightload", 1, 1, 1, 1)
    ours |= {"private_peak_bytes": 7 * 10**6, "fresh_seconds": [1.5]}
    other = a_row("other", "peer", 3, 3, 3, 3) | {"private_peak_bytes": 9 * 10**6, "fresh_seconds": [4.0]}
    won, lost = summarised(ours, other), summarised(ours, a_row("other", "peer", 0.5, 0.5))
    alone = summarised(ours)
    result = {
        "checkpoint": "one",
        "bytes": 10**9,
        "tensors": 3,
        "scenarios": [won | where, lost | where, alone | where],
    }
    lines = overview([result]).splitlines()
    assert lines[0] == "**one**: 1.00 GB, 3 tensors"
    load = "warm page cache, private memory"
    assert lines[4] == f"| {load} | 1.000 s | other: 3.000 s | **3.00** | 0.40 | 1.500 s / 4.000 s | 7 MB / 9 MB |"
    assert lines[5] == f"| {load} | 1.000 s | other: 0.500 s | (0.50) | 0.40 | 1.500 s | 7 MB |"
    assert "nobody else was measured" in lines[6]


def test_a_setting_that_the_heats_dropped_is_never_first() -> None:
    """Lucky in its only load, it would be before all medians."""
    dropped = a_row("weightload load_file", "weightload") | {"heat_seconds": [0.026], "dropped_after_heats": True}
    ours = a_row("weightload", "weightload", 0.025, 0.031, 0.030, 0.032, 0.029)
    theirs = a_row("safetensors", "safetensors", 0.030, 0.028, 0.029, 0.0275, 0.031)
    for found in (summarised(ours, dropped, theirs), summarised(ours, dropped | {"seconds": [0.026]}, theirs)):
        assert found["verdict"].startswith("first: safetensors; weightload LOSES: weightload is 0.97x as fast (within")
        assert [row["best_setting"] for row in found["rows"]] == [True, False, True]


def test_how_far_chance_goes() -> None:
    """``by_chance`` says what scipy.stats.mannwhitneyu(method="exact") says where no times are equal."""
    from report.compare_summary import by_chance, doubt

    assert by_chance([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    assert by_chance([1, 2, 3, 4, 6], [5, 7, 8, 9, 10]) == pytest.approx(4 / 252)
    assert by_chance([1, 4, 5], [2, 3, 6]) == pytest.approx(1)
    assert by_chance([1, 1, 1], [1, 1, 1]) == 1
    assert by_chance([1], [2]) == 1
    assert doubt([1, 2, 3], [7, 8, 9]) == " (of only 3 loads)"
    assert doubt([1, 2, 3, 4], [7, 8, 9, 10]) == ""
    assert doubt([1, 2, 3, 8], [7, 8, 9, 10]) == " (within the spread)"


def test_the_order_of_each_round_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads follow one another in an order that varies, and a seed gives the same order again."""
    import random

    from harness.compare_run import Rounds, State

    # There are no files to prepare. What it does for memory takes a fifth of a second each of 240 times.
    monkeypatch.setattr(State, "prepare", lambda state, last: None)

    def order(seed: int) -> list[str]:
        rounds = Rounds([], [], "disk", "warm", "private", random.Random(seed))
        found: list[str] = []
        rounds.limits = {name: lambda files, name=name: float(found.append(name) or 1) for name in "abcd"}
        rounds._repeat(list(rounds.limits), 20, None)
        return found

    first = order(1)
    assert first == order(1) != order(2)
    turns = [first[at : at + 4] for at in range(0, 80, 4)]
    assert all(sorted(turn) == list("abcd") for turn in turns)
    before_b = {turn[turn.index("b") - 1] for turn in turns if turn[0] != "b"}
    assert before_b == {"a", "c", "d"}


def test_the_main_picture_shows_what_decides() -> None:
    from report import compare_plot

    def result(name: str, size: int, tensors: int) -> dict[str, Any]:
        found = [
            {
                "place": place,
                "cache": cache,
                "ranks": ranks,
                "kind": kind,
                "rows": [a_row("weightload", "weightload", 1)],
            }
            for place, cache, ranks in (
                ("disk", "warm", 1),
                ("disk", "cold", 1),
                ("tmpfs", "warm", 1),
                ("disk", "warm", 2),
            )
            for kind in ("mapped", "private", "into")
        ]
        for each in found:
            each["rows"][0]["median_s"] = 1
        return {"checkpoint": name, "bytes": size, "tensors": tensors, "scenarios": found}

    def shown(*results: dict[str, Any]) -> list[list[tuple[Any, ...]]]:
        return [
            [(r["checkpoint"], s["cache"], s["kind"], s["ranks"]) for r, s in panels]
            for panels in compare_plot._main(results)
        ]

    large, small = result("large", 100, 10), result("small", 1, 1000)
    alone = [[("large", cache, kind, 1) for kind in ("mapped", "private")] for cache in ("warm", "cold")]
    assert shown(large, result("other", 50, 50), small) == [
        *alone,
        [("large", "warm", "private", 2), ("small", "warm", "private", 1)],
    ]
    assert shown(large) == [*alone, [("large", "warm", "private", 2)]]
