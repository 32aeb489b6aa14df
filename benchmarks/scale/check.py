"""The model held against this machine: measures its parts over gloo, predicts loads on the CPU from them, runs them.

Ranks are processes of torchrun. Few CPUs do everything here, so that stages are taken to add up, not to overlap.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/, also when this is run by itself

from checkpoints.architectures import ARCHITECTURES
from checkpoints.synth import layers_for, write_checkpoint
from harness.machine import describe, fill_cache

import weightload
from scale.costs import MIB, STORAGES, Assumptions, Load, seconds
from weightload._base.cpus import usable_cpus
from weightload._checkpoint.selection import open_files

BLOCK = 64 * MIB  # the loader's block of CPU memory
TASK = 8 * MIB
REPEATS = 5
LIMIT_S = 600  # of one torchrun


def check(ranks: Sequence[int], gigabytes: float) -> dict[str, Any]:
    """Measure, predict and load with each of these numbers of ranks; a synthetic checkpoint is written and removed."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="scale-check-") as folder:
        model = ARCHITECTURES["small-tensors" if gigabytes < 0.1 else "llama-3-8b"]
        size = write_checkpoint(Path(folder), model, layers_for(model, gigabytes), shards=3)
        files = weightload.resolve_safetensors_files(folder)
        for number in ranks:
            out = Path(folder) / f"{number}.out"
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number), __file__]
            done = subprocess.run(
                [sys.executable, *command, str(out), *files], capture_output=True, text=True, timeout=LIMIT_S
            )
            if done.returncode:
                raise RuntimeError(f"the check with {number} ranks failed:\n{done.stderr[-3000:]}")
            runs.append(compare(json.loads(out.read_text()), size))
        return {"bytes": size, "machine": describe(files), "runs": runs}


def machine_of(measured: dict[str, Any]) -> Assumptions:
    """The model's constants for a node like this one."""
    ranks = measured["ranks"]
    steps = max(1, ranks - 1)
    depth = max(1, (ranks - 1).bit_length())
    return Assumptions(
        gpus=ranks,
        cache_rank=measured["read_alone_bps"],
        cache_node=measured["read_together_bps"],
        map_rank=measured["map_bps"],
        host_broadcast=measured["broadcast_bps"] * depth,
        host_gather=measured["gather_bps"] * (ranks - 1) / ranks if ranks > 1 else measured["gather_bps"],
        host_memory=float("inf"),  # in the two rates above
        status_step=measured["status_s"] / steps,
        status_ring=True,
        block=BLOCK,
        threads=usable_cpus(),
        files=measured["files"],
        open_file=measured["open_s"] / measured["files"],
        overlap=False,
    )


def compare(measured: dict[str, Any], size: int) -> dict[str, Any]:
    """Predicted and measured times of the loads that ran."""
    loads = []
    for strategy, times in measured["loads"].items():
        load = Load(strategy, "node", STORAGES[1], 1, size, "cpu", machine_of(measured))
        row: dict[str, Any] = {"strategy": strategy, "predicted_s": seconds(load), "measured_s": None, "ratio": None}
        if times is not None:
            row |= {"measured_s": median(times), "ratio": row["predicted_s"] / median(times), "times": times}
        loads.append(row)
    return measured | {"loads": loads}


def print_check(result: dict[str, Any]) -> None:
    """A table for people."""
    print(f"**Checked here: {result['bytes'] / 1e9:.2f} GB to CPU memory, warm, {result['machine']['cpus']} CPUs**\n")
    print("| ranks | read alone | read together | broadcast | stripes | status | load | predicted | measured | ratio |")
    print("|" + " ---: |" * 6 + " --- |" + " ---: |" * 3)
    for run in result["runs"]:
        rates = ("read_alone_bps", "read_together_bps", "broadcast_bps", "gather_bps")
        cells = " | ".join(f"{run[key] / 1e9:.1f} GB/s" for key in rates) + f" | {run['status_s'] * 1e3:.2f} ms"
        for load in run["loads"]:
            took = f"{load['measured_s']:.3f} s | {load['ratio']:.2f}" if load["ratio"] else "not implemented |"
            print(f"| {run['ranks']} | {cells} | {load['strategy']} | {load['predicted_s']:.3f} s | {took} |")
    print()


def _slowest(action: Callable[[], object]) -> float:
    """Seconds of the slowest rank, all starting together."""
    dist.barrier()
    begin = time.perf_counter()
    action()
    took = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def _typical(action: Callable[[], object], repeats: int = REPEATS) -> float:
    action()
    return median(_slowest(action) for _ in range(repeats))


class Reader:
    """Reads files with several threads into two blocks in turn, as the loader does."""

    def __init__(self, files: Sequence[str], threads: int) -> None:
        self.tasks = [(f, at) for f in range(len(files)) for at in range(0, os.path.getsize(files[f]), TASK)]
        self.files = [os.open(file, os.O_RDONLY) for file in files]
        self.blocks = memoryview(bytearray(2 * BLOCK))
        self.threads = threads

    def read(self) -> None:
        """All bytes; preadv releases the GIL."""

        def one(number: int) -> int:
            file, at = self.tasks[number]
            place = number * TASK % (2 * BLOCK)
            return os.preadv(self.files[file], [self.blocks[place : place + TASK]], at)

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(one, range(len(self.tasks))))

    def map(self) -> None:
        """Page-table entries for all bytes."""
        for file in self.files:
            with mmap.mmap(file, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
                mapped.madvise(22)  # MADV_POPULATE_READ


def _load(files: list[str], strategy: str) -> None:
    for _ in weightload.safetensors_weights_iterator(files, device="cpu", strategy=strategy, group=None):
        pass


def measure(files: list[str]) -> dict[str, Any]:
    """This node's parts, and loads of every strategy: None where the package does not have it yet."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size = sum(map(os.path.getsize, files))
    reader = Reader(files, usable_cpus())
    block = torch.ones(BLOCK // ranks * ranks, dtype=torch.uint8)
    stripes, word = block.chunk(ranks), torch.ones(64, dtype=torch.uint8)
    words = torch.ones(64 * ranks, dtype=torch.uint8)

    def statuses() -> None:
        for _ in range(100):
            dist.all_gather_into_tensor(words, word)

    def all_stripes() -> None:
        """Gather as the loader does on the CPU: a broadcast from every rank, at once."""
        for work in [dist.broadcast(stripe, root, async_op=True) for root, stripe in enumerate(stripes)]:
            work.wait()

    found: dict[str, Any] = {
        "ranks": ranks,
        "files": len(files),
        "read_alone_bps": size / _typical(lambda: reader.read() if rank == 0 else None),
        "read_together_bps": size * ranks / _typical(reader.read),
        "map_bps": size / _typical(reader.map),
        "broadcast_bps": BLOCK / _typical(lambda: dist.broadcast(block, 0), 2 * REPEATS),
        "gather_bps": BLOCK / _typical(all_stripes, 2 * REPEATS),
        "status_s": _typical(statuses) / 100,
        "open_s": _typical(lambda: open_files(files)),
    }
    loads: dict[str, list[float] | None] = {}
    for strategy in ("independent", *(("broadcast", "striped") if ranks > 1 else ())):
        try:
            _load(files, strategy)
            loads[strategy] = [_slowest(lambda name=strategy: _load(files, name)) for _ in range(REPEATS)]  # type: ignore[misc]
        except NotImplementedError:
            loads[strategy] = None
    return found | {"loads": loads}


def main() -> None:
    """One rank: python -m torch.distributed.run --nproc-per-node N scale/check.py OUT FILE ..."""
    out, files = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        fill_cache(files)
    measured = measure(files)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
