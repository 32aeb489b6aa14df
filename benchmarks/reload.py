"""Measures reloading a model in place, again and again: reinforcement learning, hot swaps.

    python benchmarks/reload.py --model-path MODEL [--tmpfs /dev/shm] [--rounds 7] [--json FILE]

The module is there, its parameters have been written before, and the files are in the page cache: of a disk and,
copied, of a tmpfs. Ways take turns in one process, in shuffled order: `load_into`, `load_state_dict(load_file())`, and
`get_slice(name)[:]` copied into each parameter. They are held against copying as many bytes from memory to memory with
as many threads. Every way's parameters are compared with the files, byte for byte, after its first load; before each
load one parameter of every file is overwritten, and looked at afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints.expected import Checkpoint
from compare_loaders import copied_to_tmpfs
from first_loads import against
from harness.machine import describe, fill_cache
from loaders.into_loads import module_of, parameters, safetensors_load_state_dict, weightload_load_into

import weightload

CPU = torch.device("cpu")
LIMIT = "copy from memory to memory"
OURS = "weightload load_into"


def get_slices(files: list[str], module: torch.nn.Module) -> None:
    """Copy parameter by parameter, like people who reload weights into a running model by hand."""
    from safetensors import safe_open

    targets = parameters(module)
    with torch.no_grad():
        for file in files:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118  (the handle is no dict)
                    targets[name].copy_(opened.get_slice(name)[:] if targets[name].ndim else opened.get_tensor(name))


WAYS: dict[str, Callable[[list[str], torch.nn.Module], None]] = {
    OURS: weightload_load_into,
    "safetensors load_state_dict": safetensors_load_state_dict,
    "safetensors get_slice": get_slices,
}


def spoil(files: list[str], checkpoint: Checkpoint, module: torch.nn.Module) -> list[str]:
    """Overwrite a parameter of every file; the names."""
    targets = parameters(module)
    names = [next(name for name, of in checkpoint.file_of.items() if of == file) for file in files]
    for name in names:
        targets[name].view(-1).view(torch.uint8).fill_(0xA5)
    return names


def measure(files: list[str], rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of every way and of the limit, and the bytes of a load."""
    module = module_of(files)
    checkpoint = Checkpoint(files)
    total = sum(tensor.nbytes for tensor in parameters(module).values())
    source, target = (torch.empty(min(total, 1 << 30), dtype=torch.uint8).fill_(number) for number in (1, 2))

    def limit() -> None:
        for begin in range(0, total, source.numel()):
            target[: total - begin].copy_(source[: total - begin])

    seconds: dict[str, list[float]] = {name: [] for name in (LIMIT, *WAYS)}
    for number in range(rounds + 1):
        for name in random.sample(list(seconds), len(seconds)):
            names = spoil(files, checkpoint, module)
            begin = time.perf_counter()
            if name == LIMIT:
                limit()
            else:
                WAYS[name](files, module)
            took = time.perf_counter() - begin
            if name != LIMIT:
                have = parameters(module)
                looked_at = have if number == 0 else {changed: have[changed] for changed in names}
                wrong = checkpoint.differs(looked_at, CPU, whole=True)
                checkpoint.release()
                if wrong:
                    raise SystemExit(f"{name}: {wrong}")
            if number:  # the first round warms up
                seconds[name].append(took)
    return seconds, total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--tmpfs", default="/dev/shm", metavar="DIR")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    on_disk = weightload.resolve_safetensors_files(options.model_path)
    rows: list[dict[str, Any]] = []
    with copied_to_tmpfs(on_disk, options.tmpfs) as (in_memory, reason):
        for place, files in (("disk", on_disk), ("tmpfs", in_memory)):
            if not files:
                print(f"{place}: not measured: {reason}")
                continue
            fill_cache(files)
            seconds, total = measure(files, options.rounds)
            print(f"\nReload in place, {total / 1e9:.2f} GB in {len(files)} files on {place}, in the page cache:")
            for name, took in seconds.items():
                middle = statistics.median(took)
                share = statistics.median(seconds[LIMIT]) / middle
                times = "" if name in (OURS, LIMIT) else f"; {OURS} is {against(took, seconds[OURS])} times as fast"
                print(f"  {name:30} {middle:7.3f} s {total / 1e9 / middle:6.2f} GB/s, {share:.2f} of the limit{times}")
            rows.append({"place": place, "bytes": total, "seconds": seconds})
    if options.json:
        result = {**describe(on_disk), "benchmark": "reload", "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
