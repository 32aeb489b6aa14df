"""Measures what the machine can do at most, which every loader is held against.

    python benchmarks/gpu/limits.py --dir DIR [--device cuda:0] [--size-gb 4] [--threads 16] [--json FILE]

Three limits: copying from pinned memory to the device, reading a file out of the page cache, and reading it from the
disk past the page cache. With --device cpu the copy is one from memory to memory, so that the script can be tried.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/, also when this is run by itself

from harness.machine import PIECE, NotEvictedError, describe, evict, fill_cache, raw_parallel_read
from loaders.worker import a_device

MIB = 1 << 20
ALIGNMENT = 4096
THREADS = 16
LOGIC_ONLY = "cpu (logic only, not a measurement)"
PEERS = ("fastsafetensors", "instanttensor", "runai-model-streamer")


def device_facts(device: torch.device) -> dict[str, Any]:
    """The device of a result; without an accelerator, a note that it measures nothing."""
    facts: dict[str, Any] = {"device": LOGIC_ONLY if device.type == "cpu" else str(device), "device_name": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"device_name": properties.name, "device_memory_bytes": properties.total_memory}
    facts |= {"cuda": torch.version.cuda, "driver": _driver()}
    return facts


def environment(device: torch.device, files: Sequence[str]) -> dict[str, Any]:
    """Device, machine, versions, storage and commit; WEIGHTLOAD_COMMIT names it where the repository cannot."""
    facts = describe(files)
    facts["commit"] = os.environ.get("WEIGHTLOAD_COMMIT") or facts["commit"]
    for name in PEERS:
        try:
            facts["versions"][name] = version(name)
        except PackageNotFoundError:
            facts["versions"][name] = None
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, **device_facts(device), **facts}


def _driver() -> str | None:
    """Version of the kernel driver."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].removeprefix("NVRM version: ").strip()
    except (OSError, IndexError):
        return None


class Copy:
    """Copies from page-locked memory to the device, in pieces, on a stream of its own."""

    def __init__(self, device: torch.device, size: int = 256 * MIB) -> None:
        on_device = device.type != "cpu"
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=on_device).fill_(7)
        self.target = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
        self.stream = torch.Stream(device) if on_device else None

    def seconds(self, piece: int, total: int) -> float:
        """Time to move ``total`` bytes, over and over the same buffers."""
        pairs = [
            (self.host[at : at + piece], self.target[at : at + piece]) for at in range(0, self.host.numel(), piece)
        ]
        moved = 0
        if self.stream is None:
            begin = time.perf_counter()
            while moved < total:
                for source, target in pairs:
                    target.copy_(source)
                moved += self.host.numel()
            return (time.perf_counter() - begin) * total / moved
        torch.accelerator.synchronize(self.target.device)
        begin = time.perf_counter()
        with self.stream:
            while moved < total:
                for source, target in pairs:
                    target.copy_(source, non_blocking=True)
                moved += self.host.numel()
        self.stream.synchronize()
        return (time.perf_counter() - begin) * total / moved


def direct_read(files: Sequence[str], threads: int = THREADS, piece: int = PIECE) -> int:
    """Read all bytes past the page cache (O_DIRECT), ``piece`` at a time; returns how many.

    Raises:
        OSError: the file system does not do that.
    """
    sizes = [os.path.getsize(file) for file in files]
    pieces = [(number, at) for number, size in enumerate(sizes) for at in range(0, size, piece)]

    def read(first: int) -> int:
        done = 0
        descriptors: dict[int, int] = {}
        try:
            # Page-aligned, as O_DIRECT demands, and in huge pages: single ones make short requests, at half the rate.
            with mmap.mmap(-1, piece, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as buffer:
                buffer.madvise(mmap.MADV_HUGEPAGE)
                for number, at in pieces[first::threads]:
                    if number not in descriptors:
                        descriptors[number] = os.open(files[number], os.O_RDONLY | os.O_DIRECT)
                    end = min(piece, sizes[number] - at)
                    got = 0
                    while got < end:
                        with memoryview(buffer)[got:] as rest:
                            now = os.preadv(descriptors[number], [rest], at + got)
                        got += now
                        if now == 0 or (got < end and got % ALIGNMENT):
                            raise OSError(f"short direct read of {files[number]} at {at}")
                    done += end
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
        return done

    with ThreadPoolExecutor(threads) as pool:  # preadv releases the GIL
        return sum(pool.map(read, range(threads)))


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def write_random(path: Path, size: int) -> None:
    """A file that neither compresses nor is sparse."""
    random = np.random.SFC64(1)
    with path.open("wb") as file:
        for at in range(0, size, PIECE):
            file.write(random.random_raw(PIECE // 8).data.cast("B")[: size - at])


def measure(device: torch.device, folder: str, size: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    """All limits, each as a row with its rates in GB/s, or with the reason why there are none."""
    rows: list[dict[str, Any]] = []

    def row(name: str, seconds: Callable[[], float], amount: int) -> None:
        try:
            rates = [amount / 1e9 / seconds() for _ in range(repeats)]
        except (OSError, NotEvictedError, RuntimeError) as error:
            rows.append({"limit": name, "reason": f"{type(error).__name__}: {error}"})
            return
        rows.append({"limit": name, "gb_per_s": statistics.median(rates), "rates": rates})

    source = "memory" if device.type == "cpu" else "pinned memory"
    copy = Copy(device, min(256 * MIB, max(8 * MIB, size // 16)))
    copy.seconds(8 * MIB, size)  # the first copies raise clocks and make mappings
    for piece in (8, 64):
        row(f"copy from {source} to {device.type}, {piece} MiB", partial(copy.seconds, piece * MIB, size), size)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file = Path(scratch, "random")
        write_random(file, size)
        files = [str(file)]
        fill_cache(files)
        row(
            f"read of the page cache, {threads} threads", lambda: timed(lambda: raw_parallel_read(files, threads)), size
        )

        def direct() -> float:
            evict(files)
            return timed(lambda: direct_read(files, threads))

        row(f"direct read of the disk, {threads} threads", direct, size)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where checkpoints lie: a file is read there")
    parser.add_argument("--device", type=a_device, default="cuda:0")
    parser.add_argument("--size-gb", type=float, default=4, help="bytes of every measurement")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    options = parser.parse_args()
    rows = measure(options.device, options.dir, int(options.size_gb * 1e9), options.threads, options.repeats)
    result = {"benchmark": "gpu_limits", **environment(options.device, [options.dir]), "rows": rows}
    print(f"device: {result['device']} {result['device_name'] or ''}")
    for row in rows:
        print(f"{row['limit']:44} " + (f"{row['gb_per_s']:8.2f} GB/s" if "rates" in row else f"none: {row['reason']}"))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
