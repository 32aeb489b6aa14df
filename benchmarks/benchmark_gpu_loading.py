"""Compares loaders that move safetensors files to a GPU, side by side in one run.

    python benchmarks/benchmark_gpu_loading.py --model-path MODEL [--subfolder NAME] [--device cuda:0] [--warmup 1]
        [--repeats 3] [--cold] [--loaders NAME,NAME] [--sweep] [--json FILE] [--plot FILE] [--title NAME]

Every loader, in a process of its own that is set up before, moves all tensors to the device. The clock runs from the
call until the device has every tensor; they are kept until then, and afterwards their memory is given back to the
driver. Loaders take turns in every round, in rotating order, and so does the limit: the copy from pinned memory when
the files are in the page cache (verified), the direct read of the disk when they have been evicted (verified).

After the timed rounds one more load of each is checked: 50 tensors, bit for bit, as they are yielded and at the end. A
loader that yields wrong bytes in any load is reported as WRONG and has no time.

With --device cpu the same happens on the CPU: the logic is tried, nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from gpu_limits import THREADS, Copy, cold_read, environment
from peers import BASELINE, PEERS, SWEEP
from gpu_report import print_table, save_plot
from loader_worker import FailedError, Worker, a_device
from machine import NotEvictedError, evict, raw_parallel_read, resident_share

import weightload

MOST_COPIED = 8_000_000_000


def read_header(path: str) -> tuple[dict[str, Any], int]:
    """The tensors of a file, and the bytes of all."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, os.path.getsize(path) - 8 - length


class Arm:
    """A loader in the comparison: its process, and what has been learned of it."""

    def __init__(self, name: str, files: list[str], device: torch.device, log: IO[bytes], limit_s: float) -> None:
        self.name = name
        self.facts: dict[str, Any] = {"version": None, "reason": None, "wrong": None}
        self.worker: Worker | None = None
        self._attempt(lambda: setattr(self, "worker", Worker(name, files, device, log, limit_s)))

    def ready(self) -> None:
        """Wait until its process is set up."""
        self._attempt(lambda: self.facts.update(version=self.worker and self.worker.version()))

    def load(self, thorough: bool = False) -> dict[str, Any] | None:
        """One load, or None if the loader has dropped out."""
        answer: dict[str, Any] = {}
        self._attempt(lambda: answer.update(self.worker.load(thorough) if self.worker else {}))
        if answer.get("wrong"):
            self.facts["wrong"] = answer["wrong"]
            self.drop("wrong bytes")
        return answer or None

    def drop(self, reason: str) -> None:
        self.facts["reason"] = reason
        if self.worker:
            self.worker.close()
        self.worker = None

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except FailedError as error:
            self.drop(str(error))


class Comparison:
    """The files, the loaders and the limit."""

    def __init__(self, files: list[str], options: argparse.Namespace, log: IO[bytes]) -> None:
        self.files, self.options = files, options
        headers = [read_header(file) for file in files]
        self.tensors = sum(len(header) for header, _ in headers)
        self.total = sum(size for _, size in headers)
        self.arms = [Arm(name, files, options.device, log, options.limit_s) for name in options.loaders]
        for arm in self.arms:
            arm.ready()
        self.copy = Copy(options.device)
        self.last: Arm | None = None  # the one that loaded last

    def make_warm(self) -> str | None:
        """All files in the page cache; the answer is a remark if that cannot be verified."""
        try:
            if resident_share(self.files) == 1:
                return None
            raw_parallel_read(self.files, THREADS)
            share = resident_share(self.files)
        except NotEvictedError as error:
            raw_parallel_read(self.files, THREADS)
            return f"not verified: {error}"
        return None if share == 1 else f"only {share:.1%} of the files fit into the page cache"

    def make_cold(self) -> None:
        try:
            evict(self.files)
        except NotEvictedError:
            if self.last is None or self.last.worker is None:
                raise
            self.last.drop("after its load it holds the files in the page cache")
            evict(self.files)

    def limit(self, cache: str) -> tuple[float, str, str | None]:
        """Seconds that the limit takes for the bytes of the checkpoint, what it is, and a remark."""
        if cache == "cold":
            return cold_read(self.files)
        moved = min(self.total, MOST_COPIED)
        name = "copy from pinned memory" if self.options.device.type != "cpu" else "copy in memory"
        return self.copy.seconds(8 << 20, moved) * self.total / moved, name, None

    def scenario(self, cache: str) -> dict[str, Any]:
        """Rounds of all loaders in one state of the page cache, as many as are asked for and fit into the budget."""
        found: dict[str, Any] = {"cache": cache, "limit": None, "note": None, "reason": None}
        limits: list[float] = []
        answers: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in self.arms}
        first: dict[str, float] = {}
        turns = [None, *self.arms]
        deadline = 0.0
        # The loaders have warmed up when it comes to the cold scenario.
        warmup = self.options.warmup if cache == "warm" else 0
        for number in range(warmup + self.options.repeats):
            round_begin = time.monotonic()
            if number == warmup:
                deadline = round_begin + self.options.budget
            for arm in turns[number % len(turns) :] + turns[: number % len(turns)]:
                if arm is not None and (arm.worker is None or (number >= warmup and time.monotonic() > deadline)):
                    continue
                try:
                    if cache == "cold":
                        self.make_cold()
                    else:
                        found["note"] = self.make_warm()
                except NotEvictedError as error:
                    return {**found, "reason": str(error), "rows": []}
                if arm is None:
                    seconds, found["limit"], note = self.limit(cache)
                    found["note"] = found["note"] or note
                    limits += [seconds] if number >= warmup else []
                    continue
                answer = arm.load()
                self.last = arm
                if answer and number < warmup:
                    first.setdefault(arm.name, answer["seconds"])
                elif answer:
                    answers[arm.name].append(answer)
            now = time.monotonic()
            if number >= warmup and now + (now - round_begin) > deadline:
                break
        found["limit_seconds"] = limits
        found["rows"] = [
            {
                "loader": name,
                "cache": cache,
                "first_s": first.get(name),
                "seconds": [answer["seconds"] for answer in loads],
                "peak_bytes": max((answer["peak_bytes"] or 0 for answer in loads), default=0) or None,
            }
            for name, loads in answers.items()
        ]
        return found

    def check(self) -> None:
        """The untimed load whose tensors are compared."""
        for arm in self.arms:
            answer = arm.load(thorough=True)
            if answer:
                arm.facts["driver_peak_bytes"] = answer["driver_peak_bytes"]

    def summary(self, scenarios: list[dict[str, Any]], checked: bool) -> dict[str, Any]:
        """What the table shows; a loader that dropped out keeps its reason and loses its times."""
        facts = {arm.name: arm.facts for arm in self.arms}
        rows: list[dict[str, Any]] = []
        for scenario in scenarios:
            limit = statistics.median(scenario["limit_seconds"]) if scenario.get("limit_seconds") else None
            scenario["limit_gb_per_s"] = self.total / 1e9 / limit if limit else None
            same = {row["loader"]: row for row in scenario["rows"]}
            for row in same.values():
                row |= facts[row["loader"]]
                if row["reason"]:
                    row["seconds"] = []
                row["median_s"] = statistics.median(row["seconds"]) if row["seconds"] else None
            baseline = same[BASELINE]["median_s"] if BASELINE in same else None
            for row in same.values():
                median = row["median_s"]
                row["best_s"] = min(row["seconds"], default=None)
                row["gb_per_s"] = self.total / 1e9 / median if median else None
                row["speedup"] = baseline / median if median and baseline else None
                row["of_limit"] = limit / median if median and limit else None
            rows += same.values()
        return {
            "benchmark": "gpu_loading",
            "checkpoint": self.options.title or Path(self.options.model_path).name,
            "files": len(self.files),
            "tensors": self.tensors,
            "bytes": self.total,
            "checked": checked,
            **environment(self.options.device, self.files),
            "scenarios": [{key: value for key, value in s.items() if key != "rows"} for s in scenarios],
            "rows": rows,
        }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model-path", required=True, help="a safetensors file, an index or a directory")
    parser.add_argument("--subfolder", help="a folder below, such as diffusers' transformer")
    parser.add_argument("--device", type=a_device, default="cuda:0")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are counted")
    parser.add_argument("--cold", action="store_true", help="also measure with the files evicted from the page cache")
    parser.add_argument("--loaders", help=f"of {', '.join(PEERS)}; or FILE.py:FUNCTION. Default: all")
    parser.add_argument("--sweep", action="store_true", help="weightload also with 8, 16 and 32 threads")
    parser.add_argument(
        "--budget",
        type=float,
        default=1e9,
        metavar="S",
        help="time for the counted rounds of a scenario: no round begins that would end later, and no load after it",
    )
    parser.add_argument("--limit-s", type=float, default=120, metavar="S", help="longest time that one load may take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture")
    parser.add_argument("--title", help="what to call the checkpoint")
    parser.add_argument("--log", type=Path, metavar="FILE", help="what the loaders print (default: nowhere)")
    options = parser.parse_args()
    names = [name.strip() for name in options.loaders.split(",")] if options.loaders else list(PEERS)
    options.loaders = list(dict.fromkeys([*names, *(SWEEP if options.sweep else ())]))
    return options


def main() -> None:
    """Command line."""
    options = parse()
    files = weightload.resolve_safetensors_files(options.model_path, options.subfolder)
    for path in (options.json, options.plot, options.log):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    with options.log.open("wb") if options.log else tempfile.TemporaryFile() as log:
        comparison = Comparison(files, options, log)
        scenarios: list[dict[str, Any]] = []
        result: dict[str, Any] = {}

        def keep(checked: bool) -> None:
            nonlocal result
            result = comparison.summary(scenarios, checked)
            if options.json:
                partial = options.json.with_suffix(".part")
                partial.write_text(json.dumps(result, indent=1))
                os.replace(partial, options.json)

        try:
            # Written after every step: whoever stops this run has what was measured until then.
            for cache in ("warm", "cold") if options.cold else ("warm",):
                scenarios.append(comparison.scenario(cache))
                keep(checked=False)
            comparison.make_warm()
            comparison.check()
            keep(checked=True)
        finally:
            for arm in comparison.arms:
                if arm.worker:
                    arm.worker.close()
    print_table(result)
    if options.plot:
        save_plot(result, options.plot)


if __name__ == "__main__":
    main()
