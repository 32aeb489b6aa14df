"""Tables and the picture of benchmark_weight_loading_comparison.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report.figures import duration, wrapped

FOOTNOTE = """\
The time of a load is that of its slowest rank; "vs" is times as fast as python broadcast, of medians. "of read":
against one rank of each group reading every byte once; "of bcast": against broadcasting as many bytes in blocks of
64 MiB through the same group. "agree": the share of the load in which the ranks agree on what to do. On the CPU
weightload independent, auto where it chooses that, and the reader of the python broadcasts map the files; all others
have private memory."""


def heading(result: dict[str, Any]) -> str:
    """The load of a row: files, ranks, device."""
    ranks, nodes, size = result["ranks"], result["nodes"], result["group_ranks"]
    return (
        f"{result['bytes'] / 1e9:.2f} GB, {result['tensors']} tensors, {result['files']} files; {ranks} rank(s) on "
        f"{nodes} node(s), in groups of {size}, {result['backend']}, device: {result['device']}"
    )


def print_table(result: dict[str, Any]) -> None:
    """Print a result for people, in lines of at most figures.WIDTH characters."""
    memory = f"{result['memory_bytes'] / 2**30:.0f} GiB"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    cache = "warm, verified" if result["cache_verified"] else f"not verified: {'; '.join(result['cache_remarks'])}"
    print()
    for line in (
        f"{result['checkpoint']}: {heading(result)}; {result['threads']} threads a rank",
        f"{result['machine']}, {result['cpus']} CPUs, {memory}, Linux {result['kernel']}; page cache {cache}",
        f"Python {result['python']}, {versions}; commit {result['commit']}",
    ):
        print(wrapped(line))
    print(
        f"\n{'way':29} {'average':>9} {'best':>9} {'median':>9} {'GB/s':>7} {'vs':>7} {'of read':>8} {'of bcast':>8} "
        f"{'agree':>6}"
    )
    for row in result["rows"]:
        line = (
            f"{_name(row):29} {duration(row['average_s'])} {duration(row['best_s'])} {duration(row['median_s'])} "
            f"{row['gb_per_s']:7.2f} {_number(row['speedup'], 6, 'x')} {_number(row['of_raw_read'], 8)} "
            f"{_number(row['of_raw_broadcast'], 8)} {_percent(row['agreement_share']):>6}"
        )
        print(line.rstrip())
    print(f"\n{wrapped(FOOTNOTE)}\n")


def _name(row: dict[str, Any]) -> str:
    """The way, and what it chose to do where that is another thing."""
    chosen: str | None = row["strategy"]
    return f"{row['way']} ({chosen})" if chosen and chosen not in row["way"] else str(row["way"])


def _number(value: float | None, width: int, unit: str = "") -> str:
    return " " * (width + len(unit)) if value is None else f"{value:{width}.2f}{unit}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def markdown(result: dict[str, Any]) -> str:
    """The table for the README."""
    lines = [
        f"**{result['checkpoint']}**: {heading(result)}\n",
        "| way | median | GB/s | against python broadcast | of the raw read | of the raw broadcast | agreement |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        cells = [
            _name(row),
            duration(row["median_s"]).strip(),
            f"{row['gb_per_s']:.2f}",
            *(_number(row[key], 0).strip() for key in ("speedup", "of_raw_read", "of_raw_broadcast")),
            _percent(row["agreement_share"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Draw throughput by way, with the limits as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [row for row in result["rows"] if not row["limit"]]
    limits = [row for row in result["rows"] if row["limit"]]
    figure, axis = plt.subplots(figsize=(7.2, 1.7 + 0.32 * len(bars)))
    colours = ["#1f6feb" if row["way"].startswith("weightload") else "#b0b8c1" for row in bars]
    drawn = axis.barh([_name(row) for row in bars], [row["gb_per_s"] for row in bars], color=colours)
    labels = [f"{row['gb_per_s']:.3g}" + (f"  ({row['speedup']:.2f}x)" if row["speedup"] else "") for row in bars]
    white = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    axis.bar_label(drawn, labels=labels, padding=3, bbox=white)
    edge = 1.3 * max(row["gb_per_s"] for row in bars)
    axis.set_xlim(0, edge)
    for row, colour in zip(limits, ("#d1242f", "#bf8700"), strict=False):
        # Small tensors stay far below the limits, and bars should still be seen.
        label = f"{row['way']} {row['gb_per_s']:.1f}" + (", off the scale" if row["gb_per_s"] > edge else "")
        axis.axvline(row["gb_per_s"], color=colour, linewidth=1, linestyle="--", label=label, zorder=0)
    axis.set_xlabel("GB/s of checkpoint on every rank")
    axis.invert_yaxis()
    axis.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
    nodes = f" on {result['nodes']} nodes" if result["nodes"] > 1 else ""
    figure.suptitle(
        f"{result['checkpoint']}: {result['bytes'] / 1e9:.2f} GB, {result['tensors']} tensors; "
        f"{result['ranks']} rank(s){nodes}, {result['device']}, {result['cache']} page cache",
        fontsize="medium",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
