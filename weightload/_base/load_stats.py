"""Statistics of a load: bytes, seconds and rate by stage, how each file was read, and what held it up."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

from weightload._base.addresses import is_address

THREADS_STAGES = ("read", "allocate", "pin", "pin_wait", "copy")
# Where the time of the iterating thread went.
WORDS = {
    "open": "opening the files and checking their headers",
    "agreement": "the ranks' agreement, or waiting for one that was late for it,",
    "setup": "setting up: planning, mapping, threads, the device's first use,",
    "wait": "kept the consumer waiting for",
    "collective": "collectives, or ranks that were late for them,",
    "consumer": "the consumer, between two tensors,",
}
SMALL_FILE = 0.01  # share of a load's bytes; below, a file's rate says nothing


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a load."""

    seconds: float
    """Seconds of all its threads together."""
    bytes: int = 0
    """Bytes that passed through; 0 where none do."""
    threads: int = 1
    elapsed: float | None = None
    """Seconds from the beginning of the first to the end of the last, of stages that threads share."""

    @property
    def gb_per_s(self) -> float | None:
        """10^9 bytes a second, all threads together; None where nothing passed or no time did."""
        took = self.seconds if self.elapsed is None else self.elapsed
        return self.bytes / 1e9 / took if self.bytes and took > 0 else None


@dataclasses.dataclass(frozen=True)
class FileStats:
    """The reads of one file, by this rank."""

    path: str
    mapped_bytes: int
    """Brought into a mapping, ahead of the consumer."""
    buffered_bytes: int
    """Read through the page cache, by ``pread``; or copied, where the file is bytes in memory; or asked of a server."""
    direct_bytes: int
    """Read past the page cache, by ``O_DIRECT``."""
    seconds: float
    """Seconds of all reading threads together."""
    wanted_bytes: int = 0
    """Bytes of the tensors, or of the parts of them that were asked for, for which all this was read."""
    rounded_bytes: int = 0
    """Read beyond ``direct_bytes``, as ``O_DIRECT`` reads whole blocks of 4 KiB."""

    @property
    def bytes(self) -> int:
        """Bytes that were read, without ``rounded_bytes``."""
        return self.mapped_bytes + self.buffered_bytes + self.direct_bytes

    @property
    def read_bytes(self) -> int:
        """All that was read. Of a mapped file, the tensors whose pages were brought in; its pages are whole ones."""
        return self.bytes + self.rounded_bytes

    @property
    def read(self) -> str:
        """The ways it was read, in words: "mapped", "buffered", "direct", some of them, or "left to page faults".

        Of what a server has "requested".
        """
        if is_address(self.path):
            return "requested"
        ways = [way for way in ("mapped", "buffered", "direct") if getattr(self, f"{way}_bytes")]
        return " and ".join(ways) or "left to page faults"

    @property
    def gb_per_s(self) -> float | None:
        """10^9 bytes a second of one thread; None where nothing was read."""
        return self.bytes / 1e9 / self.seconds if self.bytes and self.seconds else None


@dataclasses.dataclass(frozen=True)
class DeviceStats:
    """The ring and the blocks of a load to an accelerator."""

    slots: int
    """Slots of page-locked memory that were made."""
    pageable_slots: int
    """Slots among these that could not be page-locked."""
    slots_filled: int
    """Slots' worth of reads that the plan has."""
    copies: int
    """Host-to-device copies that the plan has."""
    blocks: int
    """Allocations on the device that the plan has."""
    block_bytes: int
    """Their bytes: the tensors', and padding."""


@dataclasses.dataclass(frozen=True)
class LoadStats:
    """Statistics of a load so far, always counted: at two readings of the clock for every read and every wait."""

    seconds: float
    """From the call that began the load until its last tensor was handed out, or it was closed, or until now. On an
    accelerator the device may still be copying then."""
    ended: bool
    bytes: int
    """Bytes of the tensors that the consumer has got."""
    tensors: int
    """Their number."""
    threads: int
    """Reading threads; 0 where the consumer's page faults read."""
    stages: dict[str, Stage]
    """In the order in which a byte passes them, without those that took no part:

    ``open`` (files and headers) and, of the threads that open them, ``parse`` (checking the headers);
    ``agreement`` of the ranks;
    ``setup`` (planning, mapping, starting threads; on an accelerator, what its first use costs);
    ``read``, and on accelerators ``allocate`` (blocks), ``pin`` (making page-locked slots), ``pin_wait`` (for the
    device to give one back) and ``copy`` (queueing copies, not the copies themselves), all of the reading threads;
    ``wait`` (for them), ``collective`` (with waiting for other ranks) and ``consumer`` (what happens between two
    tensors, and making them), all three of the thread that iterates.

    What is left out of ``open`` was open before the load began."""
    files: list[FileStats]
    device: DeviceStats | None
    """Counts of a load to an accelerator; None for other loads."""

    @property
    def buffered_bytes(self) -> int:
        """Bytes that came through the page cache into private memory, by ``pread`` or from a mapping, of all files."""
        return sum(file.buffered_bytes for file in self.files)

    @property
    def direct_bytes(self) -> int:
        """Bytes that were read past the page cache, of all files."""
        return sum(file.direct_bytes for file in self.files)

    @property
    def wanted_bytes(self) -> int:
        """Bytes of tensors, or of the parts of them that were asked for, that this rank has read so far."""
        return sum(file.wanted_bytes for file in self.files)

    @property
    def read_bytes(self) -> int:
        """Bytes that it has read of the files for these: with what lies between the pieces of a part that are read in
        one go, and the rest of blocks that ``O_DIRECT`` reads whole.

        Of mapped files, those whose pages were brought in: all of a tensor's, or none where its consumer's page faults
        bring them in. What the system reads ahead, or brings into the page cache around it, is not counted."""
        return sum(file.read_bytes for file in self.files)

    @property
    def read_amplification(self) -> float | None:
        """Over-reading: ``read_bytes`` for each of ``wanted_bytes``, 1.0 at best; None where nothing was read."""
        return self.read_bytes / self.wanted_bytes if self.wanted_bytes else None

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes a second, from beginning to end."""
        return self.bytes / 1e9 / self.seconds if self.seconds else 0.0

    @property
    def slowest_file(self) -> FileStats | None:
        """The file with the lowest rate, of those that hold at least a hundredth of what was read."""
        least = SMALL_FILE * sum(file.bytes for file in self.files)
        rates = [(file.gb_per_s, file) for file in self.files if file.gb_per_s and file.bytes >= least]
        return min(rates, key=lambda rate: rate[0], default=(None, None))[1]

    @property
    def bottleneck(self) -> str:
        """The stage that the load waited for most, in words."""
        return bottleneck(self)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, with the rates, over-reading, the slowest file's path and the bottleneck."""
        values = dataclasses.asdict(self)
        for name, stage in self.stages.items():
            values["stages"][name]["gb_per_s"] = stage.gb_per_s
        for entry, file in zip(values["files"], self.files, strict=True):
            entry.update(bytes=file.bytes, read_bytes=file.read_bytes, read=file.read, gb_per_s=file.gb_per_s)
        values |= {name: getattr(self, name) for name in ("wanted_bytes", "read_bytes", "read_amplification")}
        slowest = self.slowest_file
        values["gb_per_s"] = self.gb_per_s
        return {**values, "slowest_file": slowest and slowest.path, "bottleneck": self.bottleneck}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def bottleneck(stats: LoadStats) -> str:
    """Where most of the iterating thread's time went; if in waiting for the reading threads, where theirs did."""
    stages = stats.stages
    last = {name: stages[name].seconds for name in WORDS if name in stages}
    if not last:
        return "nothing took any time"
    name = max(last, key=last.__getitem__)
    share = f"{last[name] / stats.seconds:.0%} of {_time(stats.seconds)}"
    if name != "wait":
        return f"{WORDS[name]} took {share}"
    threads = {name: stages[name].seconds for name in THREADS_STAGES if name in stages}
    return f"{_of_threads(max(threads, key=threads.__getitem__, default='read'), stats)} {WORDS['wait']} {share}"


def _of_threads(name: str, stats: LoadStats) -> str:
    rate = stats.stages["read"].gb_per_s if "read" in stats.stages else None
    return {
        "read": f"reading, at {rate:.1f} GB/s by {stats.threads} thread(s)," if rate else "reading",
        "allocate": "allocating memory on the device",
        "pin": "page-locking memory",
        "pin_wait": "copying to the device, which gave page-locked slots back late,",
        "copy": "queueing copies to the device",
    }[name]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _rate(gb_per_s: float | None) -> str:
    return f"{gb_per_s:.2f} GB/s" if gb_per_s else ""


def _lines(stats: LoadStats) -> Iterator[str]:
    sofar = "" if stats.ended else " so far"
    what = f"{stats.bytes / 1e9:.3f} GB, {stats.tensors} tensors, {len(stats.files)} file(s)"
    yield f"{what}: {_time(stats.seconds)}{sofar}, {_rate(stats.gb_per_s)}"
    for name, stage in stats.stages.items():
        threads = f"{stage.threads} threads" if stage.threads > 1 else ""
        took, rate = _time(stage.seconds), _rate(stage.gb_per_s)
        yield f"  {name.replace('_', ' '):11} {took:>9}  {rate:>12}  {threads}".rstrip()
    ways: dict[str, int] = {}
    for file in stats.files:
        ways[file.read] = ways.get(file.read, 0) + 1
    yield f"  files       {', '.join(f'{count} {way}' for way, count in ways.items())}"
    if (amplification := stats.read_amplification) is not None:
        wanted, read = stats.wanted_bytes / 1e9, stats.read_bytes / 1e9
        yield f"  over-read   {amplification:.2f} times: {read:.3f} GB of the files for {wanted:.3f} GB of tensors"
    slowest = stats.slowest_file
    if slowest and len(stats.files) > 1:
        yield f"  slowest     {slowest.path}: {_rate(slowest.gb_per_s)} a thread, {slowest.read}"
    if stats.device and stats.device.pageable_slots:
        yield f"  pageable    {stats.device.pageable_slots} of {stats.device.slots} slots could not be page-locked"
    yield f"  bottleneck  {stats.bottleneck}"


def joined(first: LoadStats, second: LoadStats) -> LoadStats:
    """Statistics of two loads of the same files at the same time: sums; of times that passed for both, the longer."""
    stages = {}
    for name in [*first.stages, *(name for name in second.stages if name not in first.stages)]:
        both = [stats.stages[name] for stats in (first, second) if name in stats.stages]
        elapsed = [stage.elapsed for stage in both if stage.elapsed is not None]
        stages[name] = Stage(
            seconds=sum(stage.seconds for stage in both),
            bytes=sum(stage.bytes for stage in both),
            threads=sum(stage.threads for stage in both) if name in THREADS_STAGES else 1,
            elapsed=max(elapsed, default=None),
        )
    files: dict[str, FileStats] = {}
    for file in [*first.files, *second.files]:
        files[file.path] = _sum(files[file.path], file, "path") if file.path in files else file
    devices = [stats.device for stats in (first, second) if stats.device is not None]
    return LoadStats(
        seconds=max(first.seconds, second.seconds),
        ended=first.ended and second.ended,
        bytes=first.bytes + second.bytes,
        tensors=first.tensors + second.tensors,
        threads=first.threads + second.threads,
        stages=stages,
        files=list(files.values()),
        device=_sum(devices[0], devices[1]) if len(devices) == 2 else None,
    )


Counted = TypeVar("Counted", FileStats, DeviceStats)


def _sum(first: Counted, second: Counted, *same: str) -> Counted:
    names = [field.name for field in dataclasses.fields(first) if field.name not in same]
    return dataclasses.replace(first, **{name: getattr(first, name) + getattr(second, name) for name in names})
