"""Measures many small loads in a busy server: adapters and text encoders, in a process with a hundred threads.

    python benchmarks/busy_server.py [--model-path FILE] [--loads 200] [--threads 100] [--json FILE]

A server's process has threads that mostly wait and now and then do a little in Python. In it a LoRA of 200 tensors
(20 MB, written for the purpose) and the model given, such as a text encoder of 90 MB, are loaded again and again, files
in the page cache, each load until every page has been touched: views of mapped files by `safe_open` and by our
iterator, and private memory, as clones and by `backend="pread"`. Ways take turns, shuffled. What counts is the median
and the slowest of a hundred (p50, p99).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from first_loads import KINDS, against
from harness import tensor_memory
from harness.machine import describe, fill_cache
from loaders.peer_loads import Load
from loaders.peers import PEERS

RANK, MODULES, WIDTH = 16, 100, 3125  # of the LoRA: two matrices of 16 x 3125 in bf16 a module, 20 MB
BURST_S, PAUSE_S = 0.0002, 0.01  # of one of the server's threads


def write_lora(path: Path) -> None:
    from safetensors.torch import save_file

    whole = torch.randint(0, 255, (2 * MODULES, RANK, WIDTH * 2), dtype=torch.uint8).view(torch.bfloat16)
    shapes = [(RANK, WIDTH), (WIDTH, RANK)]
    tensors = {f"layers.{i // 2}.lora_{'AB'[i % 2]}": whole[i].reshape(shapes[i % 2]) for i in range(2 * MODULES)}
    save_file(tensors, path)


@contextlib.contextmanager
def busy(threads: int) -> Iterator[None]:
    """So many threads that wait, and now and then hold the GIL for a moment."""
    done = threading.Event()

    def serve() -> None:
        while not done.wait(PAUSE_S * (0.5 + random.random()) * threads / 10):
            end = time.perf_counter() + BURST_S
            while time.perf_counter() < end:
                pass

    servants = [threading.Thread(target=serve) for _ in range(threads)]
    for servant in servants:
        servant.start()
    try:
        yield
    finally:
        done.set()
        for servant in servants:
            servant.join()


def once(load: Load, file: str) -> float:
    begin = time.perf_counter()
    tensors = [tensor for _, tensor in load([file], torch.device("cpu"))]
    tensor_memory.touch(tensor_memory.spans_of(tensors))
    return time.perf_counter() - begin


def measure(file: str, loads: int) -> dict[str, list[float]]:
    ways = {way: load for pair in KINDS.values() for way in pair if (load := PEERS[way].load)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(loads + 3):
        for name in random.sample(list(ways), len(ways)):
            took = once(ways[name], file)
            if number >= 3:
                seconds[name].append(took)
    return seconds


def p99(seconds: list[float]) -> float:
    return sorted(seconds)[min(len(seconds) - 1, len(seconds) * 99 // 100)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", metavar="FILE", help="loaded, too")
    parser.add_argument("--loads", type=int, default=200)
    parser.add_argument("--threads", type=int, default=100, help="of the server; 0: an idle process")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, busy(options.threads):
        lora = Path(folder, "lora.safetensors")
        write_lora(lora)
        for file in filter(None, (str(lora), options.model_path)):
            fill_cache([file])
            seconds = measure(file, options.loads)
            size = Path(file).stat().st_size
            print(f"\n{Path(file).name}, {size / 1e6:.0f} MB, {options.threads} threads beside, {options.loads} loads:")
            for kind, (them, us) in KINDS.items():
                for name in (them, us):
                    print(f"  {name:20} p50 {statistics.median(seconds[name]) * 1e3:8.2f} ms"
                          f"   p99 {p99(seconds[name]) * 1e3:8.2f} ms")  # fmt: skip
                slowest = p99(seconds[them]) / p99(seconds[us])
                print(f"  {kind}: weightload is {against(seconds[them], seconds[us])} times as fast, p99 {slowest:.2f}")
            rows.append({"file": Path(file).name, "bytes": size, "seconds": seconds})
    if options.json:
        result = {**describe([]), "benchmark": "busy_server", "threads": options.threads, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
