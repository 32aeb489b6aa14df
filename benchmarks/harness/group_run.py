"""Runs the ways of loading in turns, from one verified state, and checks what they yield."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from benchmark_weight_loading import touch
from loaders.group_ways import BASELINE, Place, Way
from safetensors import safe_open

from harness.machine import NotEvictedError, back_memory, fill_cache, raw_parallel_read, resident_share
from harness.ranks import GroupedRanks
from weightload._load.progress import Advance, unseen
from weightload.settings import current

RAW_READ = "raw parallel read"
RAW_COLLECTIVE = "raw broadcast"
BLOCK = 64 << 20
UNKNOWN = -1.0  # as a duration; between ranks only numbers travel


@dataclasses.dataclass(frozen=True)
class Timing:
    """One load or limit: its time, and how much of it the ranks took to agree on what to do."""

    seconds: float
    agreement_seconds: float = UNKNOWN
    strategy: str | None = None  # the one that was chosen, where a way chooses


def load(way: Way, place: Place) -> tuple[Timing, dict[str, torch.Tensor]]:
    """Load everything into a dict, as engines do, until every byte is where it is needed."""
    on_cpu = place.device.type == "cpu"
    tensors = {}
    begin = time.perf_counter()
    weights = way(place)
    for name, tensor in weights:
        if on_cpu:
            touch(tensor)
        tensors[name] = tensor
    if not on_cpu:
        torch.accelerator.synchronize(place.device)
    seconds = time.perf_counter() - begin
    agreement = getattr(weights, "agreement_seconds", None)
    strategy = getattr(weights, "strategy", None)
    return Timing(seconds, UNKNOWN if agreement is None else agreement, strategy), tensors


def raw_read(place: Place, ranks: GroupedRanks) -> Timing:
    """One rank of the group reads all bytes once: what no way that reads them can undercut."""
    begin = time.perf_counter()
    if ranks.first_of_group:
        raw_parallel_read(place.files, current().thread_count())
    return Timing(time.perf_counter() - begin)


def raw_collective(place: Place, total: int, block: torch.Tensor) -> Timing:
    """Send ``total`` bytes through the group, in large pieces out of and into one block."""
    begin = time.perf_counter()
    for at in range(0, total, BLOCK):
        dist.broadcast(block[: min(BLOCK, total - at)], group=place.group, group_src=0)
    if place.device.type != "cpu":
        torch.accelerator.synchronize(place.device)
    return Timing(time.perf_counter() - begin)


def differences(tensors: dict[str, torch.Tensor], files: list[str]) -> list[str]:
    """Names of tensors that are not, byte for byte, what safetensors reads, and of those too many or missing."""
    wrong = set(tensors)
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118
                expected = opened.get_tensor(name)
                found = tensors.get(name)
                same = found is not None and (found.dtype, found.shape) == (expected.dtype, expected.shape)
                if same and found is not None and torch.equal(_bytes(found.cpu()), _bytes(expected)):
                    wrong.discard(name)
                else:
                    wrong.add(name)
    return sorted(wrong)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class Comparison:
    """The ways and the limits of one checkpoint on one group."""

    def __init__(self, place: Place, ways: dict[str, Way], ranks: GroupedRanks, total: int) -> None:
        self.place, self.ways, self.ranks = place, ways, ranks
        self.limits: dict[str, Callable[[], Timing]] = {RAW_READ: lambda: raw_read(place, ranks)}
        if ranks.group_size > 1:
            block = torch.ones(BLOCK, dtype=torch.uint8, device=place.device)
            self.limits[RAW_COLLECTIVE] = lambda: raw_collective(place, total, block)
        self.timings: dict[str, list[Timing]] = {name: [] for name in (*self.limits, *ways)}
        self.dropped: dict[str, dict[str, str | None]] = {}  # ways that failed, and how
        self.remarks: list[str] = []  # why the page cache may not have been warm

    def check(self, drop_failing: bool = False, advance: Advance = unseen) -> None:
        """One untimed load of every way, compared byte for byte.

        A way that raises, or has a wrong byte on any rank, ends the run; or with ``drop_failing`` it takes no further
        part, and ``dropped`` has what was wrong. That holds for ways that fail on all ranks, or between collectives.

        Raises:
            SystemExit: on every rank, if any of them has a wrong byte.
        """
        for name, way in list(self.ways.items()):
            self.ranks.barrier()
            wrong: list[str] = []
            reason = None
            try:
                wrong = differences(load(way, self.place)[1], self.place.files)
            except Exception as error:
                if not drop_failing:
                    raise
                reason = f"{type(error).__name__}: {error}"[:300]
            gathered = self.ranks.gather((wrong, reason))
            found = [
                f"rank {rank}: {len(names)} tensors, such as {names[0]!r}"
                for rank, (names, _) in enumerate(gathered)
                if names
            ]
            reasons = [why for _, why in gathered if why]
            if found and not drop_failing:
                raise SystemExit(f"{name} does not give the bytes of the files: {'; '.join(found)}")
            if found or reasons:
                del self.ways[name], self.timings[name]
                self.dropped[name] = {"wrong": "; ".join(found) or None, "reason": reasons[0] if reasons else None}
            advance(1)

    def measure(
        self, warmup: int, repeats: int, seed: int, budget: float = math.inf, advance: Advance = unseen
    ) -> None:
        """Everything once a round, shuffled each time, by the same seed on all ranks.

        After ``budget`` seconds no round begins. ``advance`` is called with 1 after every load.
        """
        names = list(self.timings)
        order = random.Random(seed)
        begin = time.monotonic()
        for number in range(warmup + repeats):
            if number > warmup and self.ranks.slowest(time.monotonic() - begin) > budget:
                break
            for name in order.sample(names, len(names)):
                self._prepare(memory=name in self.ways)
                timing = self.limits[name]() if name in self.limits else load(self.ways[name], self.place)[0]
                # A load is as slow as its slowest rank, and so is the agreement.
                seconds, agreement = self.ranks.most([timing.seconds, timing.agreement_seconds])
                if number >= warmup:
                    self.timings[name].append(Timing(seconds, agreement, timing.strategy))
                advance(1)

    def _prepare(self, memory: bool) -> None:
        """Make every run begin alike: garbage collected, cache warm and verified, memory backed if it is used."""
        gc.collect()
        self.ranks.barrier()
        if self.ranks.first_of_node:
            files = self.place.files
            try:
                if resident_share(files) < 1:
                    fill_cache(files)
                if (share := resident_share(files)) < 1:
                    self.remarks.append(f"only {share:.1%} of the files fit into the page cache")
            except NotEvictedError as error:
                fill_cache(files)
                self.remarks.append(str(error))
            if memory and self.place.device.type == "cpu":
                back_memory(self.ranks.on_node * sum(map(os.path.getsize, files)))
        self.ranks.barrier()

    def cache_remarks(self) -> list[str]:
        """Return the remarks of all nodes."""
        return sorted({remark for remarks in self.ranks.gather(self.remarks) for remark in remarks})


def summarise(timings: dict[str, list[Timing]], total: int) -> list[dict[str, Any]]:
    """The figures that the table and the picture show, a row for every way and limit."""
    medians = {name: statistics.median(run.seconds for run in runs) for name, runs in timings.items()}
    rows = []
    for name, runs in timings.items():
        seconds = [run.seconds for run in runs]
        agreements = [run.agreement_seconds for run in runs if run.agreement_seconds != UNKNOWN]
        shares = [run.agreement_seconds / run.seconds for run in runs if run.agreement_seconds != UNKNOWN]

        def against(other: str, median: float = medians[name]) -> float | None:
            return medians[other] / median if other in medians else None

        rows.append(
            {
                "way": name,
                "limit": name in (RAW_READ, RAW_COLLECTIVE),
                "strategy": runs[0].strategy,
                "seconds": seconds,
                "median_s": medians[name],
                "average_s": statistics.fmean(seconds),
                "best_s": min(seconds),
                "gb_per_s": total / 1e9 / medians[name],
                "speedup": against(BASELINE) if name not in (RAW_READ, RAW_COLLECTIVE) else None,
                "of_raw_read": against(RAW_READ),
                "of_raw_broadcast": against(RAW_COLLECTIVE),
                "agreement_seconds": agreements,
                "agreement_share": statistics.median(shares) if shares else None,
            }
        )
    return rows
