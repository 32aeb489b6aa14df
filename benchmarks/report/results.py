"""Turns results of benchmark_weight_loading.py into a table for people and a picture; the README's tables of all.

python benchmarks/report/results.py RESULT.json ...                tables for the README
python benchmarks/report/results.py --plot F.png RESULT.json ...   and the main picture of compare_loaders.py's results;
                                                                   --plot-all, --memory, --stages: more of them
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/, also when this is run by itself

from report import compare_overview, compare_plot, compare_report, group_report
from report.figures import duration, megabytes, ratio, wrapped

FOOTNOTE = """\
GB/s and the ratios are of medians. "vs" compares weightload with safetensors, and weightload pread with
safetensors clone. "of limit": against the raw parallel read of the same scenario, which copies every byte once;
mapped loads of a warm file copy none. "warm 4K": the page cache holds single pages, not large ones. Untouched and
mapped, safetensors has read and mapped nothing yet when it is done, and weightload everything. "peak" is the growth
of the resident set, mapped page cache included; "private" is the anonymous part of it."""


def print_table(result: dict[str, Any]) -> None:
    """Print a result of benchmark_weight_loading.py, in lines of at most figures.WIDTH characters."""
    print()
    print(
        wrapped(
            f"{result['checkpoint']}: {result['bytes'] / 1e9:.2f} GB, {result['tensors']} tensors, "
            f"{result['files']} files; {result['ranks']} rank(s){_nodes(result)}, {result['threads']} threads"
        )
    )
    memory = f"{result['memory_bytes'] / 2**30:.0f} GiB"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    print(
        wrapped(
            f"{result['machine']}, {result['cpus']} CPUs, {memory}, Linux {result['kernel']}, read_ahead_kb "
            f"{result['read_ahead_kb']}; Python {result['python']}, {versions}; commit {result['commit']}"
        )
    )
    last = None
    for row in result["rows"]:
        scenario = scenario_in_words(row["cache"], row["touched"])
        if scenario != last:
            print(f"\n{scenario}")
            print(
                f"{'':18} {'average':>9} {'best':>9} {'median':>9} {'GB/s':>7} {'vs':>7} {'of limit':>8} "
                f"{'peak':>10} {'private':>10}"
            )
        last = scenario
        line = (
            f"{row['loader']:18} {duration(row['average_s'])} {duration(row['best_s'])} {duration(row['median_s'])} "
            f"{row['gb_per_s']:7.2f} {ratio(row['speedup'])} {row['of_limit']:8.2f} "
            f"{megabytes(row['peak_bytes'])} {megabytes(row['private_peak_bytes'])}"
        )
        print(line.rstrip())
    print(f"\n{wrapped(FOOTNOTE)}\n")


def scenario_in_words(cache: str, touched: bool) -> str:
    """Describes a scenario: ``cache`` is that of a row."""
    return f"{cache} page cache, {'every page touched' if touched else 'untouched'}"


def _nodes(result: dict[str, Any]) -> str:
    return f" on {result['nodes']} nodes" if result.get("nodes", 1) > 1 else ""


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Draw throughput by scenario and loader, with the limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scenarios = list(dict.fromkeys((row["cache"], row["touched"]) for row in result["rows"] if row["touched"]))
    figure, axes = plt.subplots(1, len(scenarios), figsize=(5.2 * len(scenarios), 3.4), squeeze=False)
    for axis, (cache, touched) in zip(axes[0], scenarios, strict=True):
        rows = [row for row in result["rows"] if (row["cache"], row["touched"]) == (cache, touched)]
        limit = next(row["gb_per_s"] for row in rows if row["loader"] == "raw parallel read")
        bars = [row for row in rows if row["loader"] != "raw parallel read"]
        colours = ["#1f6feb" if row["loader"].startswith("weightload") else "#b0b8c1" for row in bars]
        drawn = axis.barh([row["loader"] for row in bars], [row["gb_per_s"] for row in bars], color=colours)
        axis.bar_label(drawn, fmt="%.1f", padding=3)
        axis.axvline(limit, color="#d1242f", linewidth=1, linestyle="--", label=f"raw parallel read {limit:.1f}")
        axis.set_title(scenario_in_words(cache, touched))
        axis.set_xlabel("GB/s")
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['checkpoint']}: {result['bytes'] / 1e9:.2f} GB, {result['tensors']} tensors")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def deliver(
    result: dict[str, Any],
    json_path: Path | None,
    plot_path: Path | None,
    print_it: Callable[[dict[str, Any]], None] = print_table,
    draw: Callable[[dict[str, Any], Path], None] = save_plot,
) -> None:
    """Print the table of a result; write JSON and picture where they are wanted."""
    print_it(result)
    for path in (json_path, plot_path):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if json_path:
        json_path.write_text(json.dumps(result, indent=1))
    if plot_path:
        draw(result, plot_path)


def markdown(result: dict[str, Any]) -> str:
    """The table for the README: of benchmark_weight_loading.py the touched rows."""
    if result["benchmark"] == "weight_loading_comparison":
        return group_report.markdown(result)
    if result["benchmark"] == "compare_loaders":
        return compare_report.markdown(result)
    lines = [
        f"**{result['checkpoint']}**: {result['bytes'] / 1e9:.2f} GB, {result['tensors']} tensors\n",
        "| page cache | loader | median | GB/s | against safetensors | of the raw read | private memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        if not row["touched"] and len(result["rows"]) > 10:
            continue
        cache = row["cache"] if row["touched"] else f"{row['cache']}, untouched"
        speedup = f"{row['speedup']:.2f}" if row["speedup"] else ""
        private = f"{max(0, row['private_peak_bytes']) / 1e6:.0f} MB" if row["private_peak_bytes"] is not None else ""
        lines.append(
            f"| {cache} | {row['loader']} | {duration(row['median_s']).strip()} | {row['gb_per_s']:.2f} | {speedup} "
            f"| {row['of_limit']:.2f} | {private} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--overview", action="store_true", help="one table of all of compare_loaders.py's scenarios")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw throughput of compare_loaders.py's results")
    parser.add_argument(
        "--plot-all", type=Path, metavar="FILE", help="the same of all scenarios, not only the main ones"
    )
    parser.add_argument("--memory", type=Path, metavar="FILE", help="draw their memory")
    parser.add_argument("--stages", type=Path, metavar="FILE", help="draw the stages of weightload's loads")
    options = parser.parse_args()
    results = [json.loads(path.read_text()) for path in options.results]
    if options.overview:
        print(compare_overview.overview(results))
    for result in [] if options.overview else results:
        print(markdown(result))
    compared = [result for result in results if result["benchmark"] == "compare_loaders"]
    for path, draw in (
        (options.plot, compare_plot.save_plot),
        (options.plot_all, partial(compare_plot.save_plot, everything=True)),
        (options.memory, compare_plot.save_memory),
        (options.stages, compare_plot.save_stages),
    ):
        if path and compared:
            draw(compared, path)


if __name__ == "__main__":
    main()
