"""One table of all scenarios of compare_loaders.py: weightload beside the best of all others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loaders.peers import OURS

from report.compare_report import title
from report.compare_summary import best_of_each, doubt
from report.figures import duration, megabytes

HEAD = """\
| load | weightload | best of the others | times as fast | of the limit | first load of a process | memory |
| --- | ---: | --- | ---: | ---: | ---: | ---: |"""


def overview(results: Iterable[dict[str, Any]]) -> str:
    """The table for the README's measured part. Of both sides the best settings, in medians.

    "times as fast" is in brackets where chance may have given it; the last two columns have weightload's figure and,
    behind it, that of the other.
    """
    lines: list[str] = []
    for result in results:
        lines += [f"**{result['checkpoint']}**: {result['bytes'] / 1e9:.2f} GB, {result['tensors']} tensors", "", HEAD]
        lines += [row(scenario) for scenario in result["scenarios"] if scenario["rows"]]
        lines.append("")
    return "\n".join(lines)


def row(scenario: dict[str, Any]) -> str:
    """A scenario's line."""
    ranked = best_of_each(scenario["rows"])
    ours = next((row for row in ranked if row["of"] == OURS), None)
    other = next((row for row in ranked if row["of"] != OURS), None)
    if not ours or not other:
        return f"| {title(scenario)} | {scenario['verdict']} | | | | | |"
    times = f"{other['median_s'] / ours['median_s']:.2f}"
    times = f"({times})" if doubt(ours["seconds"], other["seconds"]) else f"**{times}**"
    share = f"{ours['of_limit']:.2f}" if ours["of_limit"] else ""
    cells = [
        title(scenario),
        duration(ours["median_s"]),
        f"{other['loader']}: {duration(other['median_s']).strip()}",
        times,
        share,
        _both(duration(ours["fresh_s"]), duration(other["fresh_s"])),
        _both(megabytes(ours.get("private_peak_bytes")), megabytes(other.get("private_peak_bytes"))),
    ]
    return f"| {' | '.join(cell.strip() for cell in cells)} |"


def _both(ours: str, other: str) -> str:
    return f"{ours.strip()} / {other.strip()}" if ours.strip() and other.strip() else ours
