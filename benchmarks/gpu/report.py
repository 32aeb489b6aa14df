"""Turns results of gpu/limits.py, gpu/ranks.py and compare_loaders.py on a GPU into tables for people.

python benchmarks/gpu/report.py RESULT.json ...             tables for the README
python benchmarks/gpu/report.py --short RESULT.json ...     a few lines for a terminal
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/, also when this is run by itself

from report import compare_report, group_report
from report.figures import ratio

UNPROVEN = "unproven: no load here was shared over NCCL on a GPU"


def heading(result: dict[str, Any]) -> list[str]:
    """The heading of a result: measurements, machine, versions."""
    device = f"device: {result['device']}" + (f", {result['device_name']}" if result["device_name"] else "")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    return [
        f"{device}; {result['machine']}, {result['cpus']} CPUs, {result['memory_bytes'] / 2**30:.0f} GiB, "
        f"Linux {result['kernel']}",
        f"Python {result['python']}, {versions}; CUDA {result['cuda']}; commit {result['commit']}",
    ]


def ranks_heading(result: dict[str, Any]) -> str:
    """Over which NCCL ranks shared the device; and, while that is so, that nothing is proven."""
    preloaded = " (preloaded)" if result["nccl_preloaded"] else ""
    unproven = f"; {UNPROVEN}" if result["unproven"] else ""
    return f"ranks share {result['device']}, NCCL {result['nccl']}{preloaded}{unproven}"


def ranks_line(run: dict[str, Any]) -> str:
    """How a run of gpu/ranks.py ended."""
    outcome = f"{'FAILED' if run['failed'] else 'skipped'}: {run['reason']}" if run["reason"] else "every byte right"
    return f"{run['ranks']} ranks, {run['backend']}: {outcome}"


def print_ranks(result: dict[str, Any]) -> None:
    """Print a result of gpu/ranks.py; the runs have printed their own tables."""
    print("\n".join([*heading(result), ranks_heading(result), *map(ranks_line, result["runs"])]))


def ranks_short(result: dict[str, Any]) -> Iterator[str]:
    """A line a run, and below it one a way."""
    yield f"  {ranks_heading(result)}"
    for run in result["runs"]:
        yield f"  {ranks_line(run)[:150]}"
        for row in run["result"]["rows"] if "result" in run else ():
            yield f"    {row['way']:32} {row['gb_per_s']:7.2f} GB/s {ratio(row['speedup'])}".rstrip()


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
    return compare_report.markdown(result)


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
    yield from compare_report.short(result)


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
