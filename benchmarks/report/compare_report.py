"""Tables of compare_loaders.py: for a terminal all loaders, for the README each one's best setting."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from loaders.peers import DEVICE, INTO, MAPPED, PRIVATE

from report.compare_summary import best_of_each
from report.figures import duration, megabytes, ratio

FOOTNOTE = """\
Times are medians of "n" loads in processes that are kept, with the quartiles; the heats before, which choose the
fastest of one's settings, do not count. "within the spread": an exact rank-sum test cannot tell the two apart (5 %);
"of only n loads": it could not, whatever their times. "fresh": the first load of a new process, after imports. "vs":
times as fast as safetensors' own way to the same. "of limit": against the fastest limit marked with * that was measured
in the same rounds. "CPU": processor time of all threads. "memory": the most private memory at any time of a load that
is neither timed nor compared (on an accelerator device memory, by the driver's count); "beyond": less the bytes of the
tensors; "kept": host memory that the process still has afterwards, for its next load. Loads that map files are
timed until one byte of each page was read; the page cache is not theirs."""
KINDS = {
    MAPPED: "views of mapped files, every page touched",
    PRIVATE: "private memory",
    INTO: "into existing parameters",
    DEVICE: "device memory",
}


def checkpoint(result: dict[str, Any]) -> str:
    size = f"{result['bytes'] / 1e9:.2f} GB"
    return f"{result['checkpoint']}: {size}, {result['tensors']} tensors, {result['files']} file(s)"


def heading(result: dict[str, Any]) -> list[str]:
    """Where it was measured, with what."""
    name = f", {result['device_name']}" if result["device_name"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    cuda = f"CUDA {result['cuda']}; " if result["cuda"] else ""
    return [
        f"device: {result['device']}{name}; {result['machine']}, {result['cpus']} CPUs, "
        f"{result['memory_bytes'] / 2**30:.0f} GiB, Linux {result['kernel']}, {result['file_system']}, "
        f"read_ahead_kb {result['read_ahead_kb']}",
        f"Python {result['python']}, {versions}; {cuda}commit {result['commit']}",
    ]


def title(scenario: dict[str, Any]) -> str:
    """The competitors of a scenario."""
    ranks = f", {scenario['ranks']} ranks" if scenario.get("ranks", 1) > 1 else ""
    cache = "tmpfs" if scenario["place"] == "tmpfs" else f"{scenario['cache']} page cache"
    return f"{cache}, {KINDS[scenario['kind']]}{ranks}"


def _private(row: dict[str, Any]) -> int | None:
    return row.get("driver_peak_bytes") or row.get("private_peak_bytes")


def print_table(result: dict[str, Any]) -> None:
    """Print a result for people."""
    print(f"\n{checkpoint(result)}")
    print("\n".join(heading(result)))
    for scenario in result["scenarios"]:
        note = f" ({scenario['note']})" if scenario["note"] else ""
        print(f"\n{title(scenario)}{note}\n  {scenario['verdict']}")
        print(
            f"  {'loader':34} {'version':>8} {'n':>2} {'median':>9} {'quartiles':>19} {'GB/s':>7} {'vs':>7} "
            f"{'of limit':>8} {'fresh':>9} {'CPU':>9} {'memory':>10} {'beyond':>10} {'kept':>10}"
        )
        for limit in [limit for limit in scenario["limits"] if not limit["dropped_after_heats"]]:
            name = f"limit: {limit['limit']}" + ("*" if limit["held_against"] else "")
            print(f"  {name:43} {_numbers(limit) if limit['seconds'] else limit['reason']}")
        ranked = sorted(scenario["rows"], key=lambda row: row["median_s"] or 1e9)
        for row in [row for row in ranked if row["median_s"]]:
            private = _private(row)
            beyond = private - result["bytes"] if private is not None and scenario["kind"] != MAPPED else None
            print(
                f"  {row['loader']:34} {row['version'] or '':>8} {_numbers(row)} {ratio(row['speedup'])} "
                f"{_share(row['of_limit'])} {duration(row['fresh_s'])} {duration(row['cpu_s'])} {megabytes(private)} "
                f"{megabytes(beyond)} {megabytes(row.get('kept_bytes'))}".rstrip()
            )
        for row in [row for row in ranked if not row["median_s"] and scenario.get("ranks", 1) > 1]:
            print(f"  {row['loader']:34}             {reason(row)}")
        if dropped := dropped_after_heats(scenario):
            print(f"  dropped after the heats: {', '.join(dropped)}")
    print()
    for name, facts in result["loaders"].items():
        if facts["reason"]:
            print(f"{name:36} {reason(facts)}")
    if not result["checked"]:
        print("\nNOT CHECKED: no load was compared with the tensors of the files")
    for what in result["checked"]:
        print(f"compared with the files: {what}")
    print(f"\n{FOOTNOTE}\n")


def dropped_after_heats(scenario: dict[str, Any]) -> list[str]:
    """The settings that took no part in what is counted, and the times that they had in the heats."""
    every = [(row["loader"], row) for row in scenario["rows"]]
    every += [(f"limit: {limit['limit']}", limit) for limit in scenario["limits"]]
    return [
        f"{name} ({duration(statistics.median(row['heat_seconds'])).strip()})"
        for name, row in every
        if row["dropped_after_heats"] and row["heat_seconds"]
    ]


def reason(row: dict[str, Any]) -> str:
    """Why a loader has no time."""
    if row["wrong"]:
        return f"WRONG: {row['wrong']}"
    return f"skipped: {row['reason'] or 'no time left for a counted load'}"


def _numbers(row: dict[str, Any]) -> str:
    quartiles = f"{duration(row['quartile1_s']).strip()}-{duration(row['quartile3_s']).strip()}"
    return f"{len(row['seconds']):2} {duration(row['median_s'])} {quartiles:>19} {row['gb_per_s']:7.2f}"


def _share(value: float | None) -> str:
    return f"{value:8.2f}" if value else " " * 8


def markdown(result: dict[str, Any]) -> str:
    """The tables for the README: of each loader the best of its settings, fastest first."""
    lines = [f"**{checkpoint(result)}**", "", *heading(result), ""]
    for scenario in result["scenarios"]:
        lines += [f"{title(scenario)}: {scenario['verdict']}", ""]
        if not scenario["rows"]:
            continue
        lines += [
            "| loader | median | quartiles | GB/s | of the limit | first load of a process | CPU time | memory |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for limit in scenario["limits"]:
            if limit["seconds"]:
                lines.append(f"| *limit: {limit['limit']}* | {_cells(limit)} | | | | |")
        for row in best_of_each(scenario["rows"]):
            name = f"**{row['loader']}**" if row["of"] == "weightload" else row["loader"]
            version = f" {row['version']}" if row["version"] else ""
            others = [
                _share(row["of_limit"]),
                duration(row["fresh_s"]),
                duration(row["cpu_s"]),
                megabytes(_private(row)),
            ]
            lines.append(f"| {name}{version} | {_cells(row)} | {' | '.join(text.strip() for text in others)} |")
        for row in scenario["rows"]:
            if row["wrong"] or (row["reason"] and scenario.get("ranks", 1) > 1):
                lines.append(f"| {row['loader']} | {reason(row)} | | | | | | |")
        if dropped := dropped_after_heats(scenario):
            lines += ["", f"Dropped after the heats: {', '.join(dropped)}."]
        lines.append("")
    skipped: dict[str, list[str]] = {}
    for name, facts in result["loaders"].items():
        if facts["reason"] and not facts["wrong"]:
            skipped.setdefault(facts["reason"], []).append(name)
    lines += [f"Not measured: {', '.join(names)} ({why})." for why, names in skipped.items()]
    lines += [f"Compared with the files: {'; '.join(result['checked']) or 'NOTHING'}."]
    return "\n".join([*lines, ""])


def _cells(row: dict[str, Any]) -> str:
    quartiles = f"{duration(row['quartile1_s']).strip()} to {duration(row['quartile3_s']).strip()}"
    return f"{duration(row['median_s']).strip()} | {quartiles} | {row['gb_per_s']:.2f}"


def short(result: dict[str, Any]) -> Iterator[str]:
    """Per scenario a line that says who is first, and one a loader."""
    for scenario in result["scenarios"]:
        rate = f"{scenario['limit_gb_per_s']:.2f} GB/s, {scenario['limit']}" if scenario["limit"] else "not measured"
        yield f"  {title(scenario)}: limit {rate}; {scenario['verdict']}"
        for row in best_of_each(scenario["rows"]):
            yield f"    {row['loader']:34} {row['gb_per_s']:7.2f} GB/s {ratio(row['speedup'])}".rstrip()
    for name, facts in result["loaders"].items():
        if facts["reason"]:
            yield f"  {name:36} {reason(facts)[:80]}"
