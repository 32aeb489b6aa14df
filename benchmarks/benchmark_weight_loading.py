"""Compares the pure-Python way to load safetensors files with weightload, side by side in one run.

    python benchmarks/benchmark_weight_loading.py --model-path MODEL [--subfolder NAME] [--warmup 1] [--repeats 5]
        [--device cuda] [--cold] [--json FILE] [--plot FILE] [--title NAME]
    torchrun [--nnodes 2 ...] --nproc-per-node 2 benchmarks/benchmark_weight_loading.py --model-path MODEL ...

Every loader yields (name, tensor) on the CPU (to_cpu=True). `touched` reads one byte of each 4 KiB page of every
tensor, as it is yielded; `untouched` does nothing with the tensors, and a loader that maps files has then read
nothing yet. With --device an accelerator (to_cpu=False) tensors are kept until all have arrived there, and the time
runs until then; compare_loaders.py compares all loaders there are. Loaders take turns in every round, in
rotating order. Under torchrun every rank loads everything for itself, all at the same time and beginning together, and
a load's time is that of the slowest rank; benchmark_weight_loading_comparison.py has the ranks share the reading.

The table goes to stdout; stderr says what is being measured, and how far that is.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

import torch
import torch.distributed as dist
from gpu.limits import Copy, device_facts
from harness.command_line import Parser, Steps, checkpoint_of, run, say, usable_device
from harness.machine import (
    PeakMemory,
    back_memory,
    describe,
    evict,
    fill_cache,
    fill_cache_with_small_pages,
    private_bytes,
    raw_parallel_read,
    resident_share,
)
from harness.ranks import Ranks
from report.results import deliver, scenario_in_words
from safetensors import safe_open

import weightload
from weightload._checkpoint.selection import open_files
from weightload._group.ranks import global_rank
from weightload._load.devices import default_device
from weightload.settings import current

Weights = Iterator[tuple[str, torch.Tensor]]
LIMIT = "raw parallel read"
BASELINE = "safetensors"


def per_tensor(files: list[str]) -> Weights:
    """safetensors as people write it."""
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118  (the handle is no dict)
                yield name, opened.get_tensor(name)


def per_tensor_cloned(files: list[str]) -> Weights:
    """Yield the tensors of ``per_tensor`` in memory of their own."""
    for name, tensor in per_tensor(files):
        yield name, tensor.clone()


def ours(files: list[str]) -> Weights:
    return weightload.safetensors_weights_iterator(files, to_cpu=True, show_progress=False)


def ours_private(files: list[str]) -> Weights:
    return weightload.safetensors_weights_iterator(files, to_cpu=True, show_progress=False, backend="pread")


LOADERS: dict[str, Callable[[list[str]], Weights]] = {
    BASELINE: per_tensor,
    "weightload": ours,
    "safetensors clone": per_tensor_cloned,
    "weightload pread": ours_private,
}


def to_device(device: torch.device) -> dict[str, Callable[[list[str]], Weights]]:
    """The loaders for an accelerator."""

    def made_there(files: list[str]) -> Weights:
        for file in files:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, opened.get_tensor(name)

    def moved_there(files: list[str]) -> Weights:
        for name, tensor in per_tensor(files):
            yield name, tensor.to(device)

    def ours_there(files: list[str]) -> Weights:
        return weightload.safetensors_weights_iterator(
            files, to_cpu=False, device=device, strategy="independent", show_progress=False
        )

    # safetensors knows its devices by name.
    baseline = made_there if device.type in ("cuda", "xpu", "npu", "hpu", "mps") else moved_there
    return {BASELINE: baseline, "safetensors .to()": moved_there, "weightload": ours_there}


# Mapped loads are compared with mapped loads, private memory with private memory.
COMPARED_WITH = {"weightload": BASELINE, "weightload pread": "safetensors clone"}


def touch(tensor: torch.Tensor) -> None:
    tensor.reshape(-1).view(torch.uint8)[::4096].sum()


def load(loader: Callable[[list[str]], Weights], files: list[str], touched: bool, device: torch.device) -> None:
    if device.type != "cpu":
        kept = [tensor for _, tensor in loader(files)]
        torch.accelerator.synchronize(kept[0].device)
        return
    for _, tensor in loader(files):
        if touched:
            touch(tensor)


def prepare_scenario(files: list[str], cache: str, ranks: Ranks, can_evict: bool) -> None:
    """The state that all rounds of a scenario start from: which pages a warm cache holds."""
    gc.collect()
    ranks.barrier()
    if cache != "cold" and can_evict:
        ranks.in_turns(lambda: evict(files))
    if ranks.first_of_node and cache != "cold" and can_evict:
        if cache == "warm 4K":
            fill_cache_with_small_pages(files)
        else:
            fill_cache(files)
    ranks.barrier()


def prepare(files: list[str], cold: bool, ranks: Ranks) -> None:
    """Make the state the same before every run: garbage collected, cache cold or warm and verified, memory backed."""
    gc.collect()
    ranks.barrier()
    if cold:
        ranks.in_turns(lambda: evict(files))
    if ranks.first_of_node:
        total = sum(os.path.getsize(file) for file in files)
        if not cold and resident_share(files) < 1:
            fill_cache(files)
        # The page cache of a cold run, private copies, and as much again.
        back_memory((3 if cold else 2) * total)
    ranks.barrier()


def timed(run: Callable[[], object], ranks: Ranks) -> float:
    begin = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - begin
    # A limit may say by itself how long the bytes take.
    return ranks.slowest(result if isinstance(result, float) else elapsed)


def measure(
    files: list[str], cache: str, touched: bool, options: argparse.Namespace, ranks: Ranks, steps: Steps
) -> list[dict[str, Any]]:
    """One scenario: every loader and the raw read, taking turns."""
    prepare_scenario(files, cache, ranks, can_evict=options.cold)
    arms: dict[str, Callable[[], object]] = {LIMIT: lambda: raw_parallel_read(files, current().thread_count())}
    device = options.device
    if device.type != "cpu":
        copy = Copy(device)
        total = sum(os.path.getsize(file) for file in files)
        arms["pinned copy"] = lambda: copy.seconds(8 << 20, total)
    for name, loader in (LOADERS if device.type == "cpu" else to_device(device)).items():
        arms[name] = lambda loader=loader: load(loader, files, touched, device)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    peaks: dict[str, int] = dict.fromkeys(arms, 0)
    # Untouched, nobody has the bytes yet: fewer rounds do.
    rounds = options.warmup + (options.repeats if touched else -(-options.repeats // 2))
    names = list(arms)
    with steps.next(scenario_in_words(cache, touched), rounds * len(names)) as advance:
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                prepare(files, cache == "cold", ranks)
                peak = PeakMemory()
                elapsed = timed(arms[name], ranks)
                if number >= options.warmup:
                    seconds[name].append(elapsed)
                    peaks[name] = max(peaks[name], peak.bytes())
                advance(1)
    scenario = {"cache": cache, "touched": touched}
    return [{**scenario, "loader": name, "seconds": seconds[name], "peak_bytes": peaks[name]} for name in arms]


def private_peak(loader: Callable[[list[str]], Weights], files: list[str]) -> int:
    """Untimed: the most private memory during a load whose tensors are dropped one by one."""
    gc.collect()
    before = private_bytes()
    most = loaded = 0
    for _, tensor in loader(files):
        touch(tensor)
        loaded += tensor.nbytes
        if loaded >= 16 << 20:
            most, loaded = max(most, private_bytes()), 0
    return max(most, private_bytes()) - before


def private_peaks(files: list[str], device: torch.device, steps: Steps) -> dict[str, int]:
    """``private_peak`` of every loader to the CPU."""
    if device.type != "cpu":
        return {}
    peaks = {}
    with steps.next("private memory", len(LOADERS)) as advance:
        for name, loader in LOADERS.items():
            peaks[name] = private_peak(loader, files)
            advance(1)
    return peaks


def summarise(rows: list[dict[str, Any]], total: int) -> None:
    """Adds the figures that the table and the picture show."""
    medians: dict[tuple[str, bool], dict[str, float]] = {}
    for row in rows:
        medians.setdefault((row["cache"], row["touched"]), {})[row["loader"]] = statistics.median(row["seconds"])
    for row in rows:
        same = medians[row["cache"], row["touched"]]
        median = same[row["loader"]]
        baseline = COMPARED_WITH.get(row["loader"])
        row["average_s"] = statistics.fmean(row["seconds"])
        row["best_s"] = min(row["seconds"])
        row["median_s"] = median
        row["gb_per_s"] = total / 1e9 / median
        row["speedup"] = same[baseline] / median if baseline else None
        row["of_limit"] = same[LIMIT] / median


def benchmark_loading(
    files: list[str], to_cpu: bool, broadcast: bool, warmup: int, repeats: int, label: str
) -> list[float]:
    """Measure weightload with the flags of FastVideo's iterator; the first rank prints a line about it.

    For programs that import it. Tensors are dropped as they come; the ranks of an initialised torch.distributed all
    call it, and begin and end together.

    Returns:
        Seconds of each of the ``repeats`` counted loads, after ``warmup`` others.
    """

    def once() -> float:
        _meet()
        begin = time.perf_counter()
        for _ in weightload.safetensors_weights_iterator(files, to_cpu, broadcast, show_progress=False):
            pass
        if not to_cpu and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        _meet()
        return time.perf_counter() - begin

    opened = open_files(files)
    tensors, total = sum(map(len, opened)), sum(file.size - file.data_begin for file in opened)
    del opened
    seconds = [once() for _ in range(warmup + repeats)][warmup:]
    if global_rank() == 0:
        average = statistics.fmean(seconds)
        print(
            f"{label}: {tensors} tensors, {total / 1e9:.2f} GB; average {average:.3f} s, best {min(seconds):.3f} s, "
            f"{total / 1e9 / average:.2f} GB/s ({repeats} loads after {warmup} others)"
        )
    return seconds


def _meet() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def main() -> None:
    """Command line."""
    parser = Parser(__doc__)
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu, or an accelerator of this process")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="also measure with the files evicted from the page cache, and with a page cache of single pages",
    )
    options = parser.parse_args()

    ranks = Ranks()
    if ranks.count > 1 and options.device.type != "cpu" and options.device.index is None:
        options.device = default_device()  # each rank has its own
    checkpoint = checkpoint_of(parser, options, ranks)
    files = checkpoint.files
    if ranks.first:
        say(f"{checkpoint}; to {options.device}, by {ranks.count} rank(s)")

    rows: list[dict[str, Any]] = []
    to_cpu = options.device.type == "cpu"
    scenarios = [
        (cache, touched)
        for cache in (("cold", "warm", "warm 4K") if options.cold else ("warm",))
        for touched in ((True, False) if cache != "warm 4K" and to_cpu else (True,))
    ]
    steps = Steps(len(scenarios) + to_cpu)
    for cache, touched in scenarios:
        rows += measure(files, cache, touched, options, ranks, steps)
    summarise(rows, checkpoint.bytes)
    memory = private_peaks(files, options.device, steps)
    for row in rows:
        row["private_peak_bytes"] = memory.get(row["loader"])

    result = {
        "benchmark": "weight_loading",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoint": checkpoint.title,
        "files": len(files),
        "tensors": checkpoint.tensors,
        "bytes": checkpoint.bytes,
        "ranks": ranks.count,
        "nodes": ranks.nodes,
        **({"device": "cpu"} if options.device.type == "cpu" else device_facts(options.device)),
        "threads": current().thread_count(),
        **describe(files),
        "rows": rows,
    }
    if ranks.first:
        deliver(result, options.json, options.plot)
    ranks.close()


if __name__ == "__main__":
    run(main)
