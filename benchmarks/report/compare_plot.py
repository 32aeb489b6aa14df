"""Pictures of compare_loaders.py: throughput against the limit, memory, and time by stage.

Drawn twice as fine as the 900 pixels that a README gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from loaders.peers import DEVICE, INTO, MAPPED, OURS, PRIVATE

from report.compare_summary import best_of_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUR_COLOUR, OTHER_COLOUR, LIMIT_COLOUR, LIGHT = "#1f6feb", "#b0b8c1", "#d1242f", "#dde3ea"
KINDS = {MAPPED: "mapped files", PRIVATE: "private memory", INTO: "into parameters", DEVICE: "device memory"}
STAGE_COLOURS = ("#1f6feb", "#bf8700", "#2da44e", "#8250df", "#cf222e", "#6e7781")
TITLE: dict[str, Any] = {"fontsize": 8.5, "loc": "left", "weight": "bold"}
Panel = tuple[dict[str, Any], dict[str, Any]]  # a result and one of its scenarios
WIDTH, BAR, DPI = 9.0, 0.23, 200  # inches, inches, dots an inch


def save_plot(results: Sequence[dict[str, Any]], path: Path, everything: bool = False) -> None:
    """Throughput by scenario and loader, of each the best of its settings, with the limit as a line.

    Only what decides, to be seen at a glance, or ``everything`` that was measured.
    """
    rows = [[(result, scenario) for scenario in state] for result in results for state in _states(result)]
    if not everything:
        rows = _main(results)
    if not rows:
        print("no picture: nothing was measured")
        return
    bars = [max(len(best_of_each(scenario["rows"])) for _, scenario in panels) for panels in rows]
    columns = max(map(len, rows))
    figure, grid = _grid([0.85 + BAR * count for count in bars], columns, results)
    for axes, panels, most in zip(grid, rows, bars, strict=True):
        named = None
        for axis, (result, scenario) in zip(axes, panels, strict=False):
            _throughput(axis, result, scenario)
            axis.set_ylim(most - 0.4, -0.6)  # bars of one thickness
            title = _title(result, scenario)
            # Above the names too: there is no room for it above the bars.
            axis.set_title(
                title.partition(": ")[2] if result is named else title,
                x=-0.6 if columns > 1 else -0.24,
                y=1.11,
                **TITLE,
            )
            named = result
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
    _save(figure, path)


def _main(results: Sequence[dict[str, Any]]) -> list[list[Panel]]:
    """The largest checkpoint, warm and cold; below it by most ranks, and the one with the most tensors, warm.

    Where loads into memory of their own were measured, the row below has only those.
    """
    large = max(results, key=lambda result: int(result["bytes"]))
    many = max(results, key=lambda result: int(result["tensors"]))
    states = [state for state in _states(large) if state[0]["place"] == "disk"]
    rows = [[(large, scenario) for scenario in state] for state in states if _ranks(state[0]) == 1]
    by_ranks = max(states, key=lambda state: _ranks(state[0]), default=[])
    below = [(large, by_ranks[-1])] if by_ranks and _ranks(by_ranks[0]) > 1 else []
    if many is not large:
        warm = [s for s in _states(many) if (s[0]["place"], s[0]["cache"], _ranks(s[0])) == ("disk", "warm", 1)]
        below += [(many, state[-1]) for state in warm]
    return [*rows, below] if below else rows


def _ranks(scenario: dict[str, Any]) -> int:
    return int(scenario.get("ranks", 1))


def _states(result: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The scenarios to draw, side by side those that differ in the kind of memory only."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for scenario in result["scenarios"]:
        # Parameters that are there are a question of their own, which the table answers.
        if scenario["kind"] != INTO and best_of_each(scenario["rows"]):
            found.setdefault((scenario["place"], scenario["cache"], _ranks(scenario)), []).append(scenario)
    return list(found.values())


def _throughput(axis: Axes, result: dict[str, Any], scenario: dict[str, Any]) -> None:
    rows = best_of_each(scenario["rows"])
    rates = [row["gb_per_s"] for row in rows]
    total = result["bytes"] / 1e9
    # Half of the loads were in this range.
    ends = [
        [rate - total / row["quartile3_s"] for rate, row in zip(rates, rows, strict=True)],
        [total / row["quartile1_s"] - rate for rate, row in zip(rates, rows, strict=True)],
    ]
    names = [row["loader"] for row in rows]
    axis.barh(names, rates, color=_colours(rows), height=0.72)
    axis.errorbar(rates, names, xerr=ends, fmt="none", ecolor="#57606a", elinewidth=0.8, capsize=1.5)
    edge = 1.3 * max(total / row["quartile1_s"] for row in rows)
    limit = scenario["limit_gb_per_s"]
    if limit and limit < 2.5 * edge:
        edge = max(edge, 1.08 * limit)
    for rate, name, row, after in zip(rates, names, rows, ends[1], strict=True):
        white = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        bold = "bold" if row["of"] == OURS else "normal"
        axis.text(rate + after + edge * 0.012, name, _number(rate), va="center", fontsize=7.5, weight=bold, bbox=white)
    if limit and limit <= edge:
        axis.axvline(limit, color=LIMIT_COLOUR, linewidth=1, linestyle="--", zorder=3)
    if limit:
        where = "" if limit <= edge else ", off the scale"
        text = f"{scenario['limit']}: {_number(limit)}{where}"
        axis.set_title(text, fontsize=6.5, color=LIMIT_COLOUR, loc="right", pad=2)
    axis.set_xlim(0, edge)
    _style(axis, "GB/s")
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        if row["of"] == OURS:
            label.set_color(OUR_COLOUR)
            label.set_fontweight("bold")


def save_memory(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The most private memory of a load, and how much of it is the tensors themselves."""
    panels = [
        (result, scenario)
        for result in results
        for scenario in result["scenarios"]
        if (scenario["place"], scenario["cache"], scenario.get("ranks", 1)) == ("disk", "warm", 1)
        and scenario["kind"] in (PRIVATE, DEVICE)
        and best_of_each(scenario["rows"])
    ]
    if not panels:
        print("no picture of memory: nothing was measured")
        return
    counts = [len(best_of_each(scenario["rows"])) for _, scenario in panels]
    figure, grid = _grid([0.75 + BAR * count for count in counts], 1, results)
    for (axis,), (result, scenario) in zip(grid, panels, strict=True):
        rows = best_of_each(scenario["rows"])
        peaks = [row.get("driver_peak_bytes") or row.get("private_peak_bytes") or 0 for row in rows]
        rows = [row for _, row in sorted(zip(peaks, rows, strict=True), key=lambda pair: pair[0])]
        peaks.sort()
        names = [row["loader"] for row in rows]
        axis.barh(names, [min(peak, result["bytes"]) / 1e9 for peak in peaks], color=LIGHT, label="tensors")
        beyond = [max(0, peak - result["bytes"]) / 1e9 for peak in peaks]
        axis.barh(names, beyond, left=result["bytes"] / 1e9, color=_colours(rows))
        for name, peak, more in zip(names, peaks, beyond, strict=True):
            axis.text(max(peak, result["bytes"]) / 1e9 * 1.01, name, f"+{_number(more)}", va="center", fontsize=7.5)
        axis.set_xlim(0, 1.12 * max(*peaks, result["bytes"]) / 1e9)
        _style(axis, "GB; light: the tensors themselves, with what there is beyond them at any time")
        axis.set_title(_title(result, scenario), **TITLE)
    _save(figure, path)


def save_stages(results: Sequence[dict[str, Any]], path: Path) -> None:
    """How long each stage of a load was at work, beside the load's own time: stages run at the same time.

    One load of each checkpoint for each state of its files.
    """
    found: dict[tuple[int, str, str], tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {}
    for number, result in enumerate(results):
        for scenario in result["scenarios"]:
            for row in best_of_each(scenario["rows"]):
                if row["of"] == OURS and row.get("stats") and row["stats"].get("stages"):
                    found.setdefault((number, scenario["place"], scenario["cache"]), (result, scenario, row))
    panels = list(found.values())
    if not panels:
        print("no picture of stages: no loader told of them")
        return
    rows = [panels[first : first + 2] for first in range(0, len(panels), 2)]
    bars = [max(len(row["stats"]["stages"]) for _, _, row in pair) for pair in rows]
    figure, grid = _grid([1.0 + BAR * count for count in bars], max(map(len, rows)), results)
    for axes, pair in zip(grid, rows, strict=True):
        for axis, (result, scenario, row) in zip(axes, pair, strict=False):
            _stages(axis, row)
            axis.set_title(_title(result, scenario), x=-0.12, **TITLE)
        for axis in axes[len(pair) :]:
            axis.set_visible(False)
    _save(figure, path)


def _stages(axis: Axes, row: dict[str, Any]) -> None:
    stages = row["stats"]["stages"]
    colours = [STAGE_COLOURS[number % len(STAGE_COLOURS)] for number in range(len(stages))]
    # A stage's seconds are those of all its threads.
    times = [1e3 * stage["seconds"] / stage.get("threads", 1) for stage in stages.values()]
    drawn = axis.barh(list(stages), times, color=colours)
    axis.bar_label(drawn, fmt=" %.3g", fontsize=7.5)
    axis.axvline(1e3 * row["stats"]["seconds"], color="#24292f", linewidth=1, linestyle="--")
    axis.margins(x=0.15)
    slowest = row["stats"].get("bottleneck")
    why = "\n" + fill(f"{row['loader']}: {slowest}", 70) if slowest else ""
    _style(axis, f"ms a thread; dashed: the whole load{why}")


def _title(result: dict[str, Any], scenario: dict[str, Any]) -> str:
    ranks = f", {scenario['ranks']} ranks" if scenario.get("ranks", 1) > 1 else ""
    cache = "tmpfs" if scenario["place"] == "tmpfs" else scenario["cache"]
    return f"{result['checkpoint']}, {result['bytes'] / 1e9:.2g} GB: {cache}{ranks}, {KINDS[scenario['kind']]}"


def _colours(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [OUR_COLOUR if row["of"] == OURS else OTHER_COLOUR for row in rows]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _style(axis: Axes, unit: str) -> None:
    axis.set_xlabel(unit, fontsize=7, labelpad=1)
    axis.tick_params(labelsize=7.5, length=2)
    if not axis.yaxis_inverted():
        axis.invert_yaxis()  # the fastest on top
    axis.spines[["top", "right"]].set_visible(False)


def _grid(heights: list[float], columns: int, results: Sequence[dict[str, Any]]) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a row of axes for each height in inches, and below them where all of it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        len(heights),
        columns,
        figsize=(WIDTH, sum(heights) + 0.4),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    first = results[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items() if number)
    device = first["device_name"] or f"{first['machine']}, {first['cpus']} CPUs"
    figure.supxlabel(f"{device}; {versions}; commit {first['commit']}", fontsize=5.5, color="#57606a")
    return figure, [list(axes) for axes in grid]


def _save(figure: Figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
