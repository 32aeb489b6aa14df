"""Turns results of gpu_limits.py, gpu_ranks.py and benchmark_gpu_loading.py into tables for people and a picture.

python benchmarks/gpu_report.py RESULT.json ...             tables for the README
python benchmarks/gpu_report.py --short RESULT.json ...     a few lines for a terminal
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import group_report

UNPROVEN = "unproven: no load here was shared over NCCL on a GPU"
FOOTNOTE = """\
Times are medians of "n" loads. "vs": times as fast as safetensors in the same state of the page cache. "of limit":
against the limit measured in the same rounds. "first": the first load of a process, which also sets up pinned memory.
"beyond": device memory in use at the peak beyond the tensors' own bytes, by the driver's count, in a load that is not
timed; "torch": the peak of torch's allocator in the timed loads. After every load all loaders are treated alike:
tensors dropped, garbage collected, the allocator's cache emptied."""


def heading(result: dict[str, Any]) -> list[str]:
    """What was measured, where, with what."""
    device = f"device: {result['device']}" + (f", {result['device_name']}" if result["device_name"] else "")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    return [
        f"{device}; {result['machine']}, {result['cpus']} CPUs, {result['memory_bytes'] / 2**30:.0f} GiB, "
        f"Linux {result['kernel']}",
        f"Python {result['python']}, {versions}; CUDA {result['cuda']}; commit {result['commit']}",
    ]


def checkpoint(result: dict[str, Any]) -> str:
    return f"{result['checkpoint']}: {result['bytes'] / 1e9:.2f} GB, {result['tensors']} tensors"


def limit_line(scenario: dict[str, Any]) -> str:
    """The limit of a scenario, or why there is none."""
    if scenario["reason"]:
        return f"{scenario['cache']}: not measured: {scenario['reason']}"
    rate = f"{scenario['limit_gb_per_s']:.2f} GB/s" if scenario["limit_gb_per_s"] else "not measured"
    note = f" ({scenario['note']})" if scenario["note"] else ""
    return f"{scenario['cache']}: limit {rate}, {scenario['limit']}{note}"


def print_table(result: dict[str, Any]) -> None:
    """Print a result of benchmark_gpu_loading.py."""
    print(f"\n{checkpoint(result)}, {result['files']} files")
    print("\n".join(heading(result)))
    for scenario in result["scenarios"]:
        print(f"\n{limit_line(scenario)}")
        rows = [row for row in result["rows"] if row["cache"] == scenario["cache"]]
        head = f"{'loader':34} {'version':>8} {'n':>2} {'median':>9} {'best':>9} {'GB/s':>7} {'vs':>7} {'of limit':>8}"
        if rows:
            print(f"{head} {'first':>9} {'beyond':>10} {'torch':>10}")
        for row in rows:
            if row["median_s"] is None:
                print(f"{row['loader']:34} {row['version'] or '':>8}    {reason(row)}")
                continue
            print(
                f"{row['loader']:34} {row['version'] or '':>8} {len(row['seconds']):2} {_time(row['median_s'])} "
                f"{_time(row['best_s'])} {row['gb_per_s']:7.2f} {_ratio(row['speedup'])} {_share(row['of_limit'])} "
                f"{_time(row['first_s'])} {_beyond(row.get('driver_peak_bytes'), result['bytes'])} "
                f"{_megabytes(row['peak_bytes'])}"
            )
    if not result["checked"]:
        print("\nNOT CHECKED: the run ended before the load whose tensors are compared")
    print(f"\n{FOOTNOTE}\n")


def reason(row: dict[str, Any]) -> str:
    """Why a row has no time."""
    if row["wrong"]:
        return f"WRONG: {row['wrong']}"
    return f"skipped: {row['reason'] or 'no time left for a counted load'}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return " " * 9
    return f"{seconds:7.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:6.2f} ms"


def _ratio(value: float | None) -> str:
    return f"{value:6.2f}x" if value else " " * 7


def _share(value: float | None) -> str:
    return f"{value:8.2f}" if value else " " * 8


def _megabytes(value: int | None) -> str:
    return f"{value / 1e6:7.0f} MB" if value is not None else " " * 10


def _beyond(peak: int | None, total: int) -> str:
    return _megabytes(peak - total if peak is not None else None)


def ranks_heading(result: dict[str, Any]) -> str:
    """Over which NCCL ranks shared the device; and, while that is so, that nothing is proven."""
    preloaded = " (preloaded)" if result["nccl_preloaded"] else ""
    unproven = f"; {UNPROVEN}" if result["unproven"] else ""
    return f"ranks share {result['device']}, NCCL {result['nccl']}{preloaded}{unproven}"


def ranks_line(run: dict[str, Any]) -> str:
    """How a run of gpu_ranks.py ended."""
    outcome = f"{'FAILED' if run['failed'] else 'skipped'}: {run['reason']}" if run["reason"] else "every byte right"
    return f"{run['ranks']} ranks, {run['backend']}: {outcome}"


def print_ranks(result: dict[str, Any]) -> None:
    """Print a result of gpu_ranks.py; the runs have printed their own tables."""
    print("\n".join([*heading(result), ranks_heading(result), *map(ranks_line, result["runs"])]))


def ranks_short(result: dict[str, Any]) -> Iterator[str]:
    """A line a run, and below it one a way."""
    yield f"  {ranks_heading(result)}"
    for run in result["runs"]:
        yield f"  {ranks_line(run)[:150]}"
        for row in run["result"]["rows"] if "result" in run else ():
            yield f"    {row['way']:32} {row['gb_per_s']:7.2f} GB/s {_ratio(row['speedup'])}".rstrip()


def markdown(result: dict[str, Any]) -> str:
    """The table for the README."""
    if result["benchmark"] == "gpu_ranks":
        parts = [*heading(result), ranks_heading(result), ""]
        for run in result["runs"]:
            parts += [ranks_line(run), "", *([group_report.markdown(run["result"])] if "result" in run else [])]
        return "\n".join(parts)
    if result["benchmark"] == "gpu_limits":
        lines = ["| limit | GB/s |", "| --- | ---: |"]
        for row in result["rows"]:
            value = f"{row['gb_per_s']:.2f}" if "rates" in row else f"none ({row['reason']})"
            lines.append(f"| {row['limit']} | {value} |")
        return "\n".join([*heading(result), "", *lines, ""])
    lines = [
        checkpoint(result),
        "",
        *heading(result),
        "",
        "| page cache | loader | median | GB/s | against safetensors | of the limit | memory beyond the tensors |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for scenario in result["scenarios"]:
        rate = f"{scenario['limit_gb_per_s']:.2f}" if scenario["limit_gb_per_s"] else ""
        lines.append(f"| {scenario['cache']} | limit: {scenario['limit'] or scenario['reason']} | | {rate} | | | |")
        for row in result["rows"]:
            if row["cache"] == scenario["cache"]:
                lines.append(f"| {row['cache']} | {_row(row, result['bytes'])} |")
    return "\n".join([*lines, ""])


def _row(row: dict[str, Any], total: int) -> str:
    name = f"{row['loader']} ({row['version']})" if row["version"] else row["loader"]
    if row["median_s"] is None:
        return f"{name} | {reason(row)} | | | |"
    ratio, share = _ratio(row["speedup"]).strip(" x"), _share(row["of_limit"]).strip()
    memory = _beyond(row.get("driver_peak_bytes"), total).strip()
    return f"{name} | {_time(row['median_s']).strip()} | {row['gb_per_s']:.2f} | {ratio} | {share} | {memory}"


def short(result: dict[str, Any]) -> Iterator[str]:
    """One line a limit, and a line a loader with its GB/s in every state of the page cache."""
    yield f"{result.get('checkpoint', 'limits')}; device: {result['device']} {result['device_name'] or ''}".rstrip()
    if result["benchmark"] == "gpu_ranks":
        yield from ranks_short(result)
        return
    if result["benchmark"] == "gpu_limits":
        for row in result["rows"]:
            yield f"  {row['limit']:40} " + (f"{row['gb_per_s']:8.2f} GB/s" if "rates" in row else row["reason"][:60])
        return
    for scenario in result["scenarios"]:
        yield f"  {limit_line(scenario)}"
    for name in dict.fromkeys(row["loader"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["loader"] == name]
        if rows[0]["reason"]:
            yield f"  {name:34} {reason(rows[0])[:80]}"
            continue
        cells = [
            f"{row['cache']} {row['gb_per_s']:6.2f} GB/s {_ratio(row['speedup'])}" for row in rows if row["median_s"]
        ]
        yield f"  {name:34} {'   '.join(cells)}"


def save_plot(result: dict[str, Any], path: Path) -> None:
    """Draw throughput by state of the page cache and loader, with the limit as a line."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scenarios = [scenario for scenario in result["scenarios"] if not scenario["reason"]]
    bars = {s["cache"]: [r for r in result["rows"] if r["cache"] == s["cache"] and r["median_s"]] for s in scenarios}
    scenarios = [scenario for scenario in scenarios if bars[scenario["cache"]]]
    if not scenarios:
        print("no picture: nothing was measured")
        return
    height = 1.4 + 0.3 * max(len(rows) for rows in bars.values())
    figure, axes = plt.subplots(1, len(scenarios), figsize=(6.4 * len(scenarios), height), squeeze=False)
    for axis, scenario in zip(axes[0], scenarios, strict=True):
        rows = sorted(bars[scenario["cache"]], key=lambda row: -row["gb_per_s"])
        colours = ["#1f6feb" if row["loader"].startswith("weightload") else "#b0b8c1" for row in rows]
        drawn = axis.barh([row["loader"] for row in rows], [row["gb_per_s"] for row in rows], color=colours)
        axis.bar_label(drawn, fmt="%.1f", padding=3)
        if scenario["limit_gb_per_s"]:
            label = f"{scenario['limit']} {scenario['limit_gb_per_s']:.1f}"
            axis.axvline(scenario["limit_gb_per_s"], color="#d1242f", linewidth=1, linestyle="--", label=label)
            axis.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        axis.set_title(f"{scenario['cache']} page cache")
        axis.set_xlabel("GB/s")
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    device = result["device_name"] or f"device: {result['device']}"
    figure.suptitle(f"{checkpoint(result)}; {device}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    for path in options.results:
        result = json.loads(path.read_text())
        print("\n".join(short(result)) if options.short else markdown(result))


if __name__ == "__main__":
    main()
